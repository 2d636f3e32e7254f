"""Which samples make optimizer step s: a pure function of seed, epoch and global batch size, never of the world size.

The global order is cut into global batches first, and each global batch is then dealt to the ranks. So 1, 2 or 4
processes, and a run that was stopped and resumed, see the same samples at the same step.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

LENGTH_WINDOW = (
    32  # global batches that one sort by length spans: wide enough to save padding, small enough to stay random
)

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class MicroBatch:
    """Row numbers of one forward pass on one rank; `is_filler` marks a pass that only keeps collectives in step."""

    ids: Ids
    is_filler: bool


@dataclass(frozen=True)
class StepBatch:
    """One optimizer step on one rank. `num_samples` and `num_targets` count those of all ranks; the latter, samples or
    labelled words, is the divisor of the loss."""

    step: int
    epoch: int
    num_samples: int
    micro_batches: tuple[MicroBatch, ...]
    ends_epoch: bool
    num_targets: int = 0


def global_batches(
    num_rows: int, global_batch_size: int, seed: int, epoch: int, lengths: NDArray[np.int32] | None = None
) -> list[Ids]:
    """The row numbers of every global batch of an epoch, in order; the last may be smaller. Each row comes once.

    With `lengths` (tokens per row) rows are sorted by length inside windows of `LENGTH_WINDOW` batches and the full
    batches shuffled again, which saves padding and keeps batches random.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(num_rows)
    if lengths is None:
        return [order[i : i + global_batch_size] for i in range(0, num_rows, global_batch_size)]
    num_full = num_rows // global_batch_size
    full, rest = order[: num_full * global_batch_size], order[num_full * global_batch_size :]
    batches: list[Ids] = []
    window = LENGTH_WINDOW * global_batch_size
    for start in range(0, len(full), window):
        rows = full[start : start + window]
        rows = rows[np.argsort(-lengths[rows], kind="stable")]
        batches += [rows[i : i + global_batch_size] for i in range(0, len(rows), global_batch_size)]
    batches = [batches[i] for i in rng.permutation(len(batches))]
    return batches + ([rest[np.argsort(-lengths[rest], kind="stable")]] if len(rest) else [])


def deal(
    batch: Ids, rank: int, world_size: int, micro_batch_size: int, lengths: NDArray[np.int32] | None = None
) -> tuple[MicroBatch, ...]:
    """This rank's micro-batches of one global batch: every `world_size`-th row, so that ranks get rows of like length.

    Every rank gets the same number of micro-batches, as collectives need; where rows run out, a filler that repeats the
    batch's first row and must not count. With `lengths`, in tokens of all rows, those of `batch` lie longest first and
    `micro_batch_size` counts tokens, padding among them: as many rows as need no more memory than the longest.
    """
    if lengths is None:
        starts = list(range(0, -(-len(batch) // world_size), micro_batch_size))
    else:
        starts = token_pieces(lengths[batch[::world_size]], micro_batch_size)  # those of rank 0: the longest of each
    share = batch[rank::world_size]
    pieces = [share[start:stop] for start, stop in pairwise([*starts, len(batch)])]
    return tuple(MicroBatch(p, False) if len(p) else MicroBatch(batch[:1], True) for p in pieces)


def token_pieces(lengths: NDArray[np.int32], num_tokens: int, num_rows: int | None = None) -> list[int]:
    """Where to cut rows of so many tokens, longest first, into batches of at most `num_tokens` with their padding, and
    at most `num_rows`: the first row of each. A row that is longer stands alone."""
    starts = [0]
    while True:
        longest = max(1, int(lengths[starts[-1]]))
        rows = max(1, num_tokens // longest)
        following = starts[-1] + (rows if num_rows is None else min(rows, num_rows))
        if following >= len(lengths):
            return starts
        starts.append(following)


def training_steps(
    num_rows: int,
    global_batch_size: int,
    micro_batch_size: int,
    total_steps: int,
    seed: int,
    rank: int,
    world_size: int,
    lengths: NDArray[np.int32] | None = None,
    first_step: int = 0,
    targets: NDArray[np.int64] | None = None,
    micro_batch_tokens: int | None = None,
) -> Iterator[StepBatch]:
    """One rank's optimizer steps `first_step` to `total_steps - 1`, epoch after epoch.

    With `micro_batch_tokens` it is tokens, not rows, that bound a micro-batch; see `deal`. `targets` are those of each
    row (None: one). All ranks know them of all rows, so that no collective is needed to count those of a step.
    """
    steps_per_epoch = -(-num_rows // global_batch_size)
    step = first_step
    while step < total_steps:
        epoch = step // steps_per_epoch
        batches = global_batches(num_rows, global_batch_size, seed, epoch, lengths)
        for position in range(step % steps_per_epoch, steps_per_epoch):
            if step == total_steps:
                return
            batch = batches[position]
            if micro_batch_tokens is None:
                micro = deal(batch, rank, world_size, micro_batch_size)
            else:
                micro = deal(batch, rank, world_size, micro_batch_tokens, lengths)
            ends_epoch = position == steps_per_epoch - 1 or step == total_steps - 1
            num_targets = len(batch) if targets is None else int(targets[batch].sum())
            yield StepBatch(step, epoch, len(batch), micro, ends_epoch, num_targets)
            step += 1


def evaluation_batches(
    num_rows: int,
    batch_size: int,
    rank: int,
    world_size: int,
    lengths: NDArray[np.int32] | None = None,
    num_tokens: int | None = None,
) -> list[MicroBatch]:
    """This rank's evaluation batches: every row on exactly one rank, as many batches on each (fillers last). With
    `lengths` longest first, and with `num_tokens` of at most so many tokens, padding among them."""
    order = np.arange(num_rows) if lengths is None else np.argsort(-lengths, kind="stable")
    batches = cut_rows(order, batch_size, lengths, num_tokens)
    mine = [MicroBatch(b, False) for b in batches[rank::world_size]]
    fillers = -(-len(batches) // world_size) - len(mine)
    return mine + [MicroBatch(order[:1], True)] * fillers


def cut_rows(
    order: Ids, batch_size: int, lengths: NDArray[np.int32] | None = None, num_tokens: int | None = None
) -> list[Ids]:
    """`order` in batches of `batch_size` rows, fewer where more than `num_tokens` tokens would be in one; then the rows
    lie longest first."""
    if lengths is None or num_tokens is None:
        return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    starts = token_pieces(lengths[order], num_tokens, batch_size) if len(order) else []
    return [order[start:stop] for start, stop in pairwise([*starts, len(order)])]
