"""The cases of the invariance suite: every way to run one training, and covers of them that are small enough to run."""

import itertools
import random
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

MODELS = ("bert", "bert-tokens", "resnet", "minilm", "efficientnet")
"""All classify rows, with a loss of samples, but `bert-tokens`, which tags words, with a loss of tokens."""
SMALL = ("bert", "bert-tokens", "resnet")
FREEZES = ("none", "embeddings", "prefix", "1,2,3", "norms", "bias-only", "backbone", "phases")
STRATEGIES = (
    "ddp", "zero1", "zero2", "zero3", "fsdp",
    "fsdp shard", "zero2 offload", "zero3 offload", "fsdp offload",
)  # fmt: skip
WORLD_SIZES = (1, 2, 4)
ACCUMULATIONS = (1, 2, 3)
ROWS = (168, 169, 173)
"""Training rows at a global batch of 24: even, one left over for one rank, five left over for four. Seven steps an
epoch: more evaluations would take longer than the training."""
FEW_ROWS = 41
"""For the two large models, whose few steps are to reach the end of an epoch too."""
SMALL_BATCH, LARGE_BATCH = 24, 12
"""Rows of a step, for small models divisible by every world size times every accumulation. In batches of 24 one way to
cut EfficientNet's batches differs from the others: an input of a ReLU6 within rounding of its kink, see
docs/sameness.md."""
CHEAP = 7
"""Seconds that a case may take which only fills up a cover."""
MICRO_BATCH_COST = {"ddp": 0.5, "zero1": 0.7, "zero2": 0.7, "fsdp": 1.2, "zero3": 4}
SMALL_STEPS, LARGE_STEPS = 30, 6
"""Of a training. `benchmarks/invariance.py --large-steps 30` gives the large models as many."""


@dataclass(frozen=True)
class Case:
    """One way to run a training. Cases with the same `reference` must give the same numbers."""

    model: str
    freeze: str
    strategy: str
    world_size: int
    accumulation: int
    rows: int

    @property
    def name(self) -> str:
        parts = (self.reference, self.strategy, f"{self.world_size} processes", f"accumulation {self.accumulation}")
        return ", ".join(parts)

    @property
    def loss(self) -> str:
        """What the loss counts."""
        return "tokens" if self.model == "bert-tokens" else "samples"

    @property
    def global_batch_size(self) -> int:
        return SMALL_BATCH if self.model in SMALL else LARGE_BATCH

    @property
    def reference(self) -> str:
        return f"{self.model}, {self.freeze}, {self.rows} rows"

    @property
    def cost(self) -> float:
        """About how many seconds it takes 2 cores, as measured: more processes than cores wait for each other at every
        collective, and zero3 has one for each module, direction and micro-batch."""
        micro_batches = self.accumulation * MICRO_BATCH_COST[self.strategy.partition(" ")[0]]
        seconds = 1.5 + micro_batches if self.model in SMALL else 5 + 0.4 * micro_batches
        return seconds * {1: 1, 2: 2, 4: 6}[self.world_size]

    def overrides(self) -> dict[str, Any]:
        """Sections of the config that differ from the model's base."""
        strategy, _, extra = self.strategy.partition(" ")
        shard = {"strategy": strategy}
        if extra == "shard":
            shard["frozen"] = "shard"
        elif extra == "offload":
            shard["offload"] = "optimizer" if strategy == "zero2" else "parameters"
        micro = self.global_batch_size // self.world_size // self.accumulation
        return {"shard": shard, "micro": micro}

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def is_possible(case: Case) -> bool:
    """The two large models stand for real sizes and take a narrower choice; sharing out nothing is refused."""
    if (case.model in SMALL) == (case.rows == FEW_ROWS):
        return False
    if case.model not in SMALL and case.freeze not in ("none", "prefix", "norms"):
        return False
    if case.global_batch_size % (case.world_size * case.accumulation):
        return False
    # without a frozen tensor `shard.frozen` has no effect; CNN cases always hold BatchNorm, so there it has
    return case.strategy != "fsdp shard" or case.freeze != "none" or case.model in ("resnet", "efficientnet")


def reference_of(case: Case) -> Case:
    """The plainest way to run it: one process, one micro-batch, no sharding, every token computed in every block."""
    return Case(case.model, case.freeze, "ddp", 1, 1, case.rows)


def full_product() -> list[Case]:
    """Every possible case."""
    dimensions = (MODELS, FREEZES, STRATEGIES, WORLD_SIZES, ACCUMULATIONS, (*ROWS, FEW_ROWS))
    return [case for values in itertools.product(*dimensions) if is_possible(case := Case(*values))]


def pairwise(count: int = 122, models: Collection[str] = MODELS, seed: int = 0) -> list[Case]:
    """Cases of these models in which every possible pair of values of two dimensions occurs, filled up with cheap ones
    to `count`; with their references the 122 are about 150 trainings."""
    return _filled_cover([case for case in full_product() if case.model in models], _pairs, count, seed)


def few(count: int = 24, seed: int = 1) -> list[Case]:
    """A few of the cases of `pairwise`, of the small models at 1 and 2 processes, in which each value occurs at least
    once."""
    return _filled_cover([c for c in pairwise() if c.model in SMALL and c.world_size < 4], _values, count, seed)


def _filled_cover(
    candidates: list[Case], parts: Callable[[Case], Collection[Hashable]], count: int, seed: int
) -> list[Case]:
    """A cover, filled up with more ways to run what its cases run already: each reference is a run of its own."""
    random.Random(seed).shuffle(candidates)
    chosen = _cover(candidates, parts)
    references = {case.reference for case in chosen}
    rest = [c for c in candidates if c.cost <= CHEAP and c.reference in references and c not in chosen]
    return sorted(chosen + rest[: max(0, count - len(chosen))], key=lambda case: case.name)


def _cover(candidates: Sequence[Case], parts: Callable[[Case], Collection[Hashable]]) -> list[Case]:
    """Cases that together have every part that a candidate has: each time the one with most that are still missing for
    what it costs, and of several the one whose reference another case needs already."""
    of_case = {case: frozenset(parts(case)) for case in candidates}
    missing, gains = set().union(*of_case.values()), {case: len(of_case[case]) / case.cost for case in candidates}
    chosen: list[Case] = []
    references: set[str] = set()
    while missing:
        best, most = candidates[0], (0.0, False)
        for case in candidates:
            if (gains[case], True) > most:  # what a case adds only shrinks: a look at the last number is often enough
                gains[case] = len(missing & of_case[case]) / case.cost
                if (gains[case], case.reference in references) > most:
                    best, most = case, (gains[case], case.reference in references)
        chosen.append(best)
        references.add(best.reference)
        missing -= of_case[best]
    return chosen


def _values(case: Case) -> Sequence[tuple[str, Any]]:
    return list(case.to_json().items())


def _pairs(case: Case) -> Sequence[Hashable]:
    """The pairs of its values; and, as one process has nothing to shard, its freeze and its strategy at several.
    What is offloaded is so at one process too."""
    is_shared_out = case.world_size > 1 and not case.strategy.endswith("offload")
    shared_out = [(case.freeze, case.strategy, "several")] if is_shared_out else []
    return [*itertools.combinations(_values(case), 2), *shared_out]
