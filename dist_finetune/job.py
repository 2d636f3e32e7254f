"""What all stages of a run share, and how far the run has come."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from dist_finetune.data.loading import Rows
from dist_finetune.models.card import Provenance
from dist_finetune.plan import Plan
from dist_finetune.report import Reporter
from dist_finetune.world import World


@dataclass(frozen=True)
class Job:
    """A planned run on this rank: decisions, data, and whom to tell."""

    plan: Plan
    world: World
    report: Reporter
    folder: Path
    splits: dict[str, Rows]
    tokenizer: PreTrainedTokenizerBase | None


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
    train_s: float = 0.0
    attempts: int = 1
    phases_done: list[dict[str, Any]] = field(default_factory=list)
    """Name, last step and number of verified frozen tensors of each finished phase."""

    def end_phase(self, name: str, num_verified: int, has_next: bool) -> None:
        """Notes the end of a phase, and moves on to the next where there is one."""
        self.phases_done = [done for done in self.phases_done if done["name"] != name]
        self.phases_done.append({"name": name, "last_step": self.step, "num_frozen_verified": num_verified})
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
