"""From a phase of the plan to an engine: load, freeze, optimizer, shard. The order is the contract.

Every start goes this way, the first as well as one from a checkpoint and one of a later phase: base weights, then what
a checkpoint changed, then the freeze, then an optimizer of exactly what trains, then the shards, then Adam's moments.
"""

import time
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import nn

from dist_finetune.cache.build import cache_splits
from dist_finetune.cache.cut import NoCut, NotWorth
from dist_finetune.checkpoint.read import Checkpoint, load_moments, load_weights
from dist_finetune.checkpoint.saver import Saver
from dist_finetune.data.loading import Rows
from dist_finetune.engine import open_accelerator, shard
from dist_finetune.engine.precision import round_frozen
from dist_finetune.evaluate import to_device
from dist_finetune.freeze import apply_freeze
from dist_finetune.gradients import require_gradients
from dist_finetune.job import Job, Progress, Stage
from dist_finetune.load_once import change_once_a_node, load_once_a_node
from dist_finetune.models.card import Provenance
from dist_finetune.models.load import load_model
from dist_finetune.models.sources import build_model
from dist_finetune.models.unread import skip_unread
from dist_finetune.optim import build_optimizer
from dist_finetune.phases import PhasePlan
from dist_finetune.plan import Plan
from dist_finetune.proof import digest_frozen, digest_tensor
from dist_finetune.report import Reporter
from dist_finetune.whole_steps import takes_whole_steps
from dist_finetune.world import World


@dataclass(frozen=True)
class _Work:
    """What the steps of a stage compute: the whole model on rows of the data, or what a cache leaves of both."""

    phase: PhasePlan
    splits: dict[str, Rows]
    cache: str
    """See `Stage.cache`, and so for the others."""
    dropped: dict[str, torch.Tensor] = field(default_factory=dict)
    is_whole: bool = False


def load_base(plan: Plan, world: World, report: Reporter) -> tuple[nn.Module, Provenance]:
    """The plan's model with its base weights, whole, on the CPU of every rank, its memory shared within a node.
    Collective."""
    model, classes = plan.spec.model, plan.data.classes
    module, provenance, problem = load_once_a_node(
        lambda: load_model(plan.card, model, classes, plan.spec.train.seed),
        lambda: build_model(plan.card, model, classes),
        world,
    )
    if problem:
        report.notes([f"each process holds a whole model in host memory at load: {problem}"])
    if plan.skips_unread:
        skip_unread(module)
    return module, provenance


def open_stage(job: Job, phase: PhasePlan, checkpoint: Checkpoint | None, model: nn.Module) -> Stage:
    """The engine of `phase` around `model` (fresh from `load_base`), with the state of `checkpoint`. Collective."""
    accelerator = open_accelerator(job.plan, phase, job.world)
    if checkpoint:
        change_once_a_node(model, partial(load_weights, model, checkpoint), job.world)
    apply_freeze(model, phase.manifest)
    digests = digest_frozen(model, phase.manifest)
    rows = job.splits["train"]
    setting = f"phases.{phase.index}.freeze.patterns" if job.plan.spec.phases else "freeze.patterns"
    require_gradients(model, rows.first_batch(), rows.task, len(rows.classes), setting)
    decision = job.plan.cache[phase.index]
    work = _Work(phase, job.splits, f"none: {decision.reason}")
    started_s = time.perf_counter()
    done = checkpoint.state["progress"] if checkpoint else {}
    is_uncached = phase.index in done.get("uncached", ())
    if is_uncached:
        work = replace(work, cache="none: it was found not to pay")
    elif decision.use:
        is_begun = bool(done) and done["phase"] == phase.index and done["step"] > done["phase_first_step"]
        try:
            work = _cached(job, phase, model, digests, is_begun)
        except NoCut as reason:
            job.report.say(f"note: no cache: {reason}")
            is_uncached = isinstance(reason, NotWorth)
            work = replace(work, cache=f"none: {reason}")
    cache_s = time.perf_counter() - started_s
    phase, splits = work.phase, work.splits
    rounded = _rounded(job, phase, model)
    optimizer = build_optimizer(model, phase.groups)
    engine = shard(model, optimizer, job.plan, phase, accelerator, job.world, work.is_whole)
    engine.rehearse(to_device(splits["train"].first_batch()["inputs"], job.world.device))
    if checkpoint:
        load_moments(engine, checkpoint, checkpoint.state["adam_steps"])
        engine.loss_scale.restore(checkpoint.state["loss_scale"])
    return Stage(phase, engine, splits, digests, work.dropped, rounded, cache_s, work.cache, is_uncached, work.is_whole)


def _rounded(job: Job, phase: PhasePlan, model: nn.Module) -> dict[str, str]:
    """Rounds frozen weights where the config asks for it; digests of the rounded tensors, by name."""
    if phase.frozen_dtype is None:
        return {}
    trained = {name for p in job.plan.phases[: phase.index] for name in p.manifest.trainable}
    names = round_frozen(model, phase.manifest, trained)
    return {name: digest_tensor(model.get_parameter(name)) for name in names}


def _cached(job: Job, phase: PhasePlan, model: nn.Module, digests: dict[str, str], is_begun: bool) -> _Work:
    """Turns `model` into the part above its frozen prefix, fed from stored activations. Raises NoCut, with the model as
    it was, where that fails or does not pay."""
    full = job.plan.spec.checkpoint.full
    # buffers too: BatchNorm that trained in an earlier phase has moved its statistics
    changed = {r.name for p in job.plan.phases[: phase.index] for r in p.manifest.records if not r.frozen}
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    splits, cut, told = cache_splits(job, phase, model, digests, is_begun)
    state = {r.name for r in phase.manifest.records if full or r.name in changed}
    kept = [name for name in cut.dropped if name in state]  # what the model computes by itself is no part of it
    dropped = {name: tensors[name].detach().to("cpu", copy=True) for name in kept}
    phase = replace(phase, manifest=phase.manifest.without(cut.dropped))
    is_whole = bool(cut.chain) and takes_whole_steps(job.plan, phase, model, splits["train"], job.world)
    if is_whole:
        job.report.say("each process computes all of a step: exchanging its gradients would take longer")
    return _Work(phase, splits, told, dropped, is_whole)


def next_stage(job: Job, stage: Stage, progress: Progress, saver: Saver) -> Stage:
    """Ends a stage and opens the phase that `progress` has moved on to, from the checkpoint that was saved last."""
    stage.engine.close()
    model, _ = load_base(job.plan, job.world, job.report)
    return open_stage(job, job.plan.phases[progress.phase], saver.settled(), model)
