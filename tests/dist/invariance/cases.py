"""The cases of the invariance suite: every way to run one training, and covers of them that are small enough to run."""

import itertools
import random
from collections.abc import Iterator, Sequence
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
ROWS = (36, 37, 41)
"""Training rows at a global batch of 12: even, one left over for one rank, five left over for four."""
GLOBAL_BATCH_SIZE = 12
STEPS = {"bert": 30, "bert-tokens": 30, "resnet": 30, "minilm": 6, "efficientnet": 6}


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
    def reference(self) -> str:
        return f"{self.model}, {self.freeze}, {self.rows} rows"

    def overrides(self) -> dict[str, Any]:
        """Sections of the config that differ from the model's base."""
        strategy, _, extra = self.strategy.partition(" ")
        shard = {"strategy": strategy}
        if extra == "shard":
            shard["frozen"] = "shard"
        elif extra == "offload":
            shard["offload"] = "optimizer" if strategy == "zero2" else "parameters"
        micro = GLOBAL_BATCH_SIZE // self.world_size // self.accumulation
        return {"shard": shard, "rows": self.rows, "freeze": self.freeze, "micro": micro, "steps": STEPS[self.model]}

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def is_possible(case: Case) -> bool:
    """The two large models stand for real sizes and take a narrower choice; sharing out nothing is refused."""
    if case.model not in SMALL and (case.freeze not in ("none", "prefix", "norms") or case.rows != 41):
        return False
    # without a frozen tensor `shard.frozen` has no effect; CNN cases always hold BatchNorm, so there it has
    return case.strategy != "fsdp shard" or case.freeze != "none" or case.model in ("resnet", "efficientnet")


def reference_of(case: Case) -> Case:
    """The plainest way to run it: one process, one micro-batch, no sharding."""
    return Case(case.model, case.freeze, "ddp", 1, 1, case.rows)


def full_product() -> list[Case]:
    """Every possible case."""
    dimensions = (MODELS, FREEZES, STRATEGIES, WORLD_SIZES, ACCUMULATIONS, ROWS)
    return [case for values in itertools.product(*dimensions) if is_possible(case := Case(*values))]


def pairwise(count: int, seed: int = 0) -> list[Case]:
    """Cases in which every possible pair of values of two dimensions occurs, filled up with small models to `count`."""
    draw = random.Random(seed)
    candidates = full_product()
    draw.shuffle(candidates)
    missing = {pair for case in candidates for pair in _pairs(case)}
    chosen: list[Case] = []
    while missing:
        best = max(candidates, key=lambda case: len(missing.intersection(_pairs(case))))
        chosen.append(best)
        missing -= set(_pairs(best))
    rest = [case for case in candidates if case.model in SMALL and case not in chosen]
    return sorted(chosen + rest[: max(0, count - len(chosen))], key=lambda case: case.name)


def few(count: int, seed: int = 1) -> list[Case]:
    """A few cases of the small models at 1 and 2 processes in which each value occurs at least once."""
    draw = random.Random(seed)
    candidates = [c for c in full_product() if c.model in SMALL and c.world_size < 4]
    draw.shuffle(candidates)
    chosen: list[Case] = []
    missing = {value for case in candidates for value in _values(case)}
    while missing:
        best = max(candidates, key=lambda case: len(missing.intersection(_values(case))))
        chosen.append(best)
        missing -= set(_values(best))
    rest = [case for case in candidates if case not in chosen]
    return sorted(chosen + rest[: max(0, count - len(chosen))], key=lambda case: case.name)


def _values(case: Case) -> Sequence[tuple[str, Any]]:
    return list(case.to_json().items())


def _pairs(case: Case) -> Iterator[tuple[tuple[str, Any], tuple[str, Any]]]:
    return itertools.combinations(_values(case), 2)
