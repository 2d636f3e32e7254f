"""From a phase of the plan to an engine: load, freeze, optimizer, shard. The order is the contract.

Every start goes this way, the first as well as one from a checkpoint and one of a later phase: base weights, then what
a checkpoint changed, then the freeze, then an optimizer of exactly what trains, then the shards, then Adam's moments.
"""

from dataclasses import dataclass

from torch import nn

from dist_finetune.checkpoint.read import Checkpoint, load_moments, load_weights
from dist_finetune.checkpoint.saver import Saver
from dist_finetune.engine import Engine, open_accelerator, shard
from dist_finetune.freeze import apply_freeze
from dist_finetune.gradients import require_gradients
from dist_finetune.job import Job, Progress
from dist_finetune.models.card import Provenance
from dist_finetune.models.load import load_model
from dist_finetune.optim import build_optimizer
from dist_finetune.phases import PhasePlan
from dist_finetune.plan import Plan
from dist_finetune.proof import digest_frozen
from dist_finetune.world import together


@dataclass(frozen=True)
class Stage:
    """A phase that is ready to train: its engine, and the digests that its frozen tensors must keep."""

    engine: Engine
    frozen_digests: dict[str, str]


def load_base(plan: Plan) -> tuple[nn.Module, Provenance]:
    """The model with its base weights, whole, on the CPU of every rank. Collective."""
    return together(lambda: load_model(plan.card, plan.spec.model, plan.data.classes, plan.spec.train.seed))


def open_stage(job: Job, phase: PhasePlan, checkpoint: Checkpoint | None, model: nn.Module) -> Stage:
    """The engine of `phase` around `model` (fresh from `load_base`), with the state of `checkpoint`. Collective."""
    accelerator = open_accelerator(job.plan, phase, job.world)
    if checkpoint:
        load_weights(model, checkpoint)
    apply_freeze(model, phase.manifest)
    digests = digest_frozen(model, phase.manifest)
    require_gradients(model, job.splits["train"].first_batch(), job.world)
    optimizer = build_optimizer(model, phase.groups)
    engine = shard(model, optimizer, job.plan, phase, accelerator, job.world)
    if checkpoint:
        load_moments(engine, checkpoint, checkpoint.state["adam_steps"])
    return Stage(engine, digests)


def next_stage(job: Job, stage: Stage, progress: Progress, saver: Saver) -> tuple[PhasePlan, Stage]:
    """Ends a stage and opens the phase that `progress` has moved on to, from the checkpoint that was saved last."""
    stage.engine.close()
    phase = job.plan.phases[progress.phase]
    model, _ = load_base(job.plan)
    return phase, open_stage(job, phase, saver.settled(), model)
