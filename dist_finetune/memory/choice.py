"""What a rank needs under each strategy, and the strategy and micro-batch that follow from it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from dist_finetune.memory.activations import Activations
from dist_finetune.memory.state import StateBytes
from dist_finetune.spec import Strategy

# Of a GPU's memory; the rest is for its context, library workspaces and what the allocator can't use.
USABLE_SHARE = 0.92
COMFORTABLE_ROWS = 8  # below so many rows a pass, a GPU mostly waits for its next kernel
# The largest micro-batch that `auto` takes, and the one it takes where no memory limit is known.
AUTO_MICRO_BATCH = {"cpu": 32, "cuda": 64}
GIB = 2**30
CACHED_PIXELS = 4 * 224 * 224
MOST_IMAGES = 64


def rows_in_caches(image_size: tuple[int, int]) -> int:
    """Images (H, W) that a CPU core takes at once in a pass without gradients: few enough for their activations to stay
    in its caches. EfficientNet-Lite0 takes 18 ms an image in fours and 36 in sixty-fours, at 224 pixels."""
    height, width = image_size
    return max(4, min(MOST_IMAGES, CACHED_PIXELS // (height * width)))


@dataclass(frozen=True)
class RankMemory:
    """One strategy: the bytes that the rank with most of them needs, and what each rank sends."""

    state: StateBytes
    micro_batch_size: int
    activations: int | None
    """Most bytes that forward and backward keep alive besides state; None where it could not be found."""
    peak: int | None
    fits: bool | None
    """None where no limit is known."""
    traffic: int
    """Bytes that a rank sends in an optimizer step."""
    phase: str | None = None
    """The phase that needs them, where several could."""

    @property
    def total(self) -> int:
        """Lasting training state."""
        return self.state.total

    @property
    def needed(self) -> int:
        """The peak, or state alone where activations are unknown."""
        return self.state.total if self.peak is None else self.peak


@dataclass(frozen=True)
class Limits:
    """What a choice has to respect."""

    world_size: int
    device: Literal["cpu", "cuda"]
    memory_bytes: int | None
    rows_per_rank: int
    """Rows that a rank takes in an optimizer step; a micro-batch divides them."""

    @property
    def usable_bytes(self) -> int | None:
        return None if self.memory_bytes is None else int(self.memory_bytes * USABLE_SHARE)

    def micro_batches(self) -> list[int]:
        """Sizes that `auto` may take, ascending."""
        cap = AUTO_MICRO_BATCH[self.device]
        return [n for n in range(1, min(cap, self.rows_per_rank) + 1) if self.rows_per_rank % n == 0]


def memory_of(
    state: Callable[[bool], StateBytes],
    traffic: Callable[[int], int],
    activations: Activations | None,
    limits: Limits,
    micro_batch_size: int | Literal["auto"],
) -> RankMemory:
    """One strategy at the given micro-batch; `auto` is the largest that fits, the smallest where none does, and a fixed
    number where no limit is known.

    `state` says what a rank holds with or without accumulation, `traffic` what it sends in so many micro-batches.
    """

    def at(rows: int) -> RankMemory:
        num_micro_batches = limits.rows_per_rank // rows
        found = state(num_micro_batches > 1)
        alive = activations.at(rows) if activations else None
        peak = found.peak(alive) if alive is not None else None
        needed, usable = found.total if peak is None else peak, limits.usable_bytes
        return RankMemory(
            found, rows, alive, peak, None if usable is None else needed <= usable, traffic(num_micro_batches)
        )

    if micro_batch_size != "auto":
        return at(micro_batch_size)
    sizes = limits.micro_batches()
    if limits.usable_bytes is None or activations is None:
        return at(sizes[-1])
    return next((found for found in map(at, reversed(sizes)) if found.fits), at(sizes[0]))


def choose_strategy(
    asked: Strategy | Literal["auto"], memory: dict[Strategy, RankMemory], limits: Limits
) -> tuple[Strategy, str]:
    """The strategy and the reason. `auto` takes the first that fits, in the order of `memory`: from few bytes sent to
    few bytes held. One that fits only with a tiny micro-batch is passed over where a later one allows a larger."""
    if asked != "auto":
        return asked, "asked for"
    order: Sequence[Strategy] = tuple(memory)
    if limits.world_size == 1:
        return order[0], "one process has nobody to share with"
    usable = limits.usable_bytes
    if usable is None:
        return order[0], "the cheapest; no memory limit is known"
    fitting = [s for s in order if memory[s].fits]
    if not fitting:
        least = min(order, key=lambda s: memory[s].needed)
        return least, f"it needs the least, and no strategy fits into {usable / GIB:.1f} GiB"
    rows = min(COMFORTABLE_ROWS, max(memory[s].micro_batch_size for s in fitting))
    chosen = next(s for s in fitting if memory[s].micro_batch_size >= rows)
    found = memory[chosen]
    what = "state" if found.peak is None else f"peak at {found.micro_batch_size} rows"
    reason = f"the cheapest that fits: {what} {found.needed / GIB:.1f} of {usable / GIB:.1f} usable GiB"
    before = order[order.index(chosen) - 1] if chosen != order[0] else None
    if before:
        at_rows = f" at {memory[before].micro_batch_size} rows" if memory[before].fits else ""
        reason += f"; {before} needs {memory[before].needed / GIB:.1f}{at_rows}"
    return chosen, reason
