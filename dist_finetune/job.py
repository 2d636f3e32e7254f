"""What all stages of a run share, and how far the run has come."""

import dataclasses
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dist_finetune.data.loading import Rows
from dist_finetune.engine import Engine
from dist_finetune.engine.statistics import moving_statistics
from dist_finetune.models.card import Provenance
from dist_finetune.phases import PhasePlan
from dist_finetune.plan import Plan
from dist_finetune.report import Reporter
from dist_finetune.signals import StopSignals
from dist_finetune.world import World

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Job:
    """A planned run on this rank: decisions, data, and whom to tell."""

    plan: Plan
    world: World
    report: Reporter
    folder: Path
    splits: dict[str, Rows]
    tokenizer: "PreTrainedTokenizerBase | None"
    signals: StopSignals
    """Whether this rank was told to stop; ranks agree on it in `stopping`."""


@dataclass(frozen=True)
class Stage:
    """A phase that is ready to train."""

    phase: PhasePlan
    """As planned; where the frozen prefix is cached, without the tensors that no rank holds any more."""
    engine: Engine
    splits: dict[str, Rows]
    """Rows of each split: encoded texts and images, or stored activations."""
    frozen_digests: dict[str, str]
    """sha256 of every frozen tensor and buffer, also of those that are not held."""
    dropped: dict[str, torch.Tensor]
    """Host copies of tensors that are not held and differ from the base model; mostly none."""
    rounded: dict[str, str]
    """sha256 of the frozen tensors that are held in bf16 (`freeze.dtype`), as rounded; the export has the source's."""
    cache_s: float
    """Seconds that filling (or finding) the cache of the frozen prefix took."""
    cache: str
    """What came of that cache: what it holds and where, or "none: " and why."""
    is_uncached: bool = False
    """True where `cache: auto` measured that a cache would not pay: a resumed run does not measure again."""
    is_whole: bool = False
    """True where each rank computes all of every step, see `whole_steps`."""

    @cached_property
    def statistics(self) -> list[torch.Tensor]:
        """Running statistics of BatchNorm that trains, where ranks would move them apart."""
        return moving_statistics(self.engine.module, self.phase.manifest)

    @property
    def held_digests(self) -> dict[str, str]:
        """sha256 of every frozen tensor and buffer as ranks hold it."""
        return self.frozen_digests | self.rounded

    @property
    def has_tail_only(self) -> bool:
        """True where the frozen prefix is cached and no rank holds it."""
        return any(name not in self._held for name in self.frozen_digests)

    @cached_property
    def _held(self) -> set[str]:
        module = self.engine.module
        return {name for name, _ in (*module.named_parameters(), *module.named_buffers())}


@dataclass
class Progress:
    """How far a run has come; all of it is in a checkpoint's state.json, so that a resumed run goes on with it."""

    step: int = 0
    """Optimizer steps taken, over all phases."""
    phase: int = 0
    phase_first_step: int = 0
    evaluated: bool = True
    """False where an evaluation is due at `step` and was not finished."""
    before: dict[str, float] | None = None
    """Validation metrics before training."""
    best: dict[str, float] | None = None
    best_step: int = 0
    without_gain: int = 0
    """Evaluations since the best one."""
    skipped: int = 0
    """Steps left out because their loss or gradients were not finite."""
    train_s: float = 0.0
    cache_s: float = 0.0
    attempts: int = 1
    uncached: list[int] = field(default_factory=list)
    """Phases in which `cache: auto` found that a cache would not pay."""
    phases_done: list[dict[str, Any]] = field(default_factory=list)
    """Name, last step and what came of the cache of each finished phase."""

    def end_phase(self, stage: Stage, has_next: bool) -> None:
        """Notes the end of a stage's phase, and moves on to the next where there is one."""
        name = stage.phase.name
        self.phases_done = [done for done in self.phases_done if done["name"] != name]
        self.phases_done.append({"name": name, "last_step": self.step, "cache": stage.cache})
        if has_next:
            self.phase, self.phase_first_step, self.without_gain = self.phase + 1, self.step, 0

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)


def identity(plan: Plan, provenance: Provenance) -> dict[str, Any]:
    """What must be the same for a checkpoint to be this run's: another value means other numbers, or another model."""
    return {
        "freeze": [phase.manifest.digest for phase in plan.phases],
        "base model": provenance.sha256,
        "data": plan.data.fingerprint,
        "classes": list(plan.data.classes),
        "train.global_batch_size": plan.batches.global_batch_size,
        "train.seed": plan.spec.train.seed,
    }
