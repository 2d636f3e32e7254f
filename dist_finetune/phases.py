"""The phases of a run: what each freezes, its groups, rates and steps. Usually there is one.

Changing what is frozen ends a phase: optimizer and partition are rebuilt, and Adam state is carried over by name.
Nothing is frozen or thawed on a live engine, where ZeRO would go on with the old partition (DeepSpeed#2615, #5639).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from dist_finetune.errors import UserError
from dist_finetune.freeze import Manifest, compile_freeze
from dist_finetune.lint import LintNote, lint
from dist_finetune.models.structure import Structure
from dist_finetune.optim import GroupPlan, plan_groups
from dist_finetune.spec import FreezeSpec, PhaseSpec, Spec, TrainSpec

LINEAR_PROBE_LR = 1e-3  # a fresh linear layer on frozen features bears a far higher rate than pre-trained weights


@dataclass(frozen=True)
class PhasePlan:
    """One phase. `first_step` and `num_steps` count optimizer steps; a phase with `until` may end sooner."""

    index: int
    name: str
    manifest: Manifest
    notes: tuple[LintNote, ...]
    groups: tuple[GroupPlan, ...]
    schedule: Literal["linear", "cosine", "constant"]
    first_step: int
    num_steps: int
    warmup_steps: int
    until: Literal["plateau"] | None
    frozen_dtype: Literal["bf16"] | None = None
    """What frozen matrices and kernels are kept in; None for fp32."""


def plan_phases(
    spec: Spec, structure: Structure, model: nn.Module, steps_per_epoch: int, default_lr: float
) -> tuple[PhasePlan, ...]:
    """Every phase of the run, in order; `model` may be on the meta device.

    Raises UserError for a freeze that can't be compiled (naming the phase), a warm-up longer than its phase, `phases`
    together with `freeze`, or a `max_steps` that leaves a phase without a step.
    """
    phases: list[PhasePlan] = []
    left = spec.train.max_steps
    since_phase: dict[str, int] = {}
    for index, phase in enumerate(_phase_specs(spec, structure)):
        num_steps = max(1, round(phase.epochs * steps_per_epoch))
        if left is not None:
            num_steps = min(num_steps, left)
            left -= num_steps
        if num_steps == 0:
            raise UserError(
                f"train.max_steps: {spec.train.max_steps} leaves no step for phase {phase.name!r}; raise it"
            )
        train = _train_of(phase, spec.train)
        manifest = _compile(phase, structure, model, len(phases))
        earlier = since_phase
        since_phase = {name: earlier.get(name, index) for name in manifest.trainable}
        groups = plan_groups(manifest, structure, train, train.lr or default_lr, since_phase)
        first_step = sum(p.num_steps for p in phases)
        warmup = _warmup_steps(train, num_steps)
        notes = lint(manifest, structure, model, train.gradient_checkpointing)
        phases.append(
            PhasePlan(
                index,
                phase.name,
                manifest,
                notes,
                groups,
                train.schedule,
                first_step,
                num_steps,
                warmup,
                phase.until,
                phase.freeze.dtype,
            )
        )
    return tuple(phases)


def _phase_specs(spec: Spec, structure: Structure) -> Sequence[PhaseSpec]:
    train = spec.train
    if spec.phases == "gradual":
        _refuse_freeze(spec)
        return _gradual(train, structure.depth)
    if spec.phases == "lp-ft":
        probe_lr = train.head_lr or LINEAR_PROBE_LR
        probe = PhaseSpec(name="linear-probe", freeze=FreezeSpec(rule="backbone"), epochs=1, lr=probe_lr)
        tuned = PhaseSpec(name="fine-tune", freeze=spec.freeze, epochs=max(train.epochs - 1, 1))
        return (probe, tuned)
    if spec.phases:
        _refuse_freeze(spec)
        names = [phase.name for phase in spec.phases]
        if len(set(names)) < len(names):
            raise UserError(f"phases: two phases share a name in {', '.join(names)}; give each its own")
        return spec.phases
    return (PhaseSpec(name="train", freeze=spec.freeze, epochs=train.epochs),)


def _refuse_freeze(spec: Spec) -> None:
    if not spec.freeze.is_none():
        raise UserError("freeze and phases are both set: each phase has a freeze of its own; remove freeze")


def _gradual(train: TrainSpec, depth: int) -> list[PhaseSpec]:
    """One phase an epoch: the head alone, then ever more blocks from the top, at last the whole model."""
    epochs = int(train.epochs)
    if epochs < 2 or epochs != train.epochs or depth == 0:
        raise UserError(
            f"phases: gradual thaws blocks from the top, an epoch each; it needs a whole number of epochs from 2 "
            f"(train.epochs is {train.epochs:g}) and a model with numbered blocks (this one has {depth})"
        )
    phases = [PhaseSpec(name="head", freeze=FreezeSpec(rule="backbone"), epochs=1)]
    for epoch in range(1, epochs):
        num_blocks = round(depth * epoch / (epochs - 1))
        rule = "none" if epoch == epochs - 1 else f"all-but-last {max(1, num_blocks)}"
        phases.append(PhaseSpec(name=f"top-{num_blocks}", freeze=FreezeSpec(rule=rule), epochs=1))
    return phases


def _train_of(phase: PhaseSpec, train: TrainSpec) -> TrainSpec:
    changed = {key: getattr(phase, key) for key in ("lr", "head_lr", "schedule", "warmup")}
    return train.model_copy(update={key: value for key, value in changed.items() if value is not None})


def _compile(phase: PhaseSpec, structure: Structure, model: nn.Module, index: int) -> Manifest:
    try:
        return compile_freeze(phase.freeze, structure, model)
    except UserError as error:
        if phase.name == "train":
            raise
        raise UserError(f"phases.{index} ({phase.name}): {error}") from None


def _warmup_steps(train: TrainSpec, num_steps: int) -> int:
    warmup = int(train.warmup) if train.warmup >= 1 else int(train.warmup * num_steps)
    if warmup >= num_steps and warmup > 0:
        raise UserError(f"train.warmup: {warmup} steps leave nothing of {num_steps} steps; use fewer, or a fraction")
    return warmup
