"""The phases of a run: what each freezes, its groups, rates and steps. Usually there is one.

Changing what is frozen ends a phase: optimizer and partition are rebuilt, and Adam state is carried over by name.
Nothing is frozen or thawed on a live engine, where ZeRO would go on with the old partition (DeepSpeed#2615, #5639).
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from dist_finetune.errors import UserError
from dist_finetune.freeze import Manifest, compile_freeze
from dist_finetune.freeze_rules import match_names, ranges
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
    trained: set[str] = set()
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
        trained |= {structure.part_of(name).kind for name in manifest.trainable}
        _refuse_idle_rates(phase, manifest, structure)
        earlier = since_phase
        since_phase = {name: earlier.get(name, index) for name in manifest.trainable}
        groups = plan_groups(manifest, structure, train, train.lr or default_lr, since_phase)
        first_step = sum(p.num_steps for p in phases)
        warmup = _warmup_steps(phase, train, num_steps)
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
    _refuse_idle_patterns(spec.train, phases)
    if idle := _idle_rates(spec.train, trained, spec.phases == "lp-ft"):
        raise UserError(f"train.{idle}")
    return tuple(phases)


def _refuse_idle_rates(phase: PhaseSpec, manifest: Manifest, structure: Structure) -> None:
    """The rates that a phase states itself."""
    trained = {structure.part_of(name).kind for name in manifest.trainable}
    if idle := _idle_rates(phase, trained):
        raise UserError(f"phases ({phase.name}): {idle}")


def _idle_rates(rates: TrainSpec | PhaseSpec, trained: Collection[str], probes: bool = False) -> str | None:
    """A rate for what does not train, as `key: why`; `probes` where head_lr is also that of a linear probe."""
    if rates.head_lr and "head" not in trained and not probes:
        return f"head_lr: {rates.head_lr:g} has no effect, the head is frozen or there is none; remove it or thaw it"
    if getattr(rates, "layer_decay", None) and not {"embeddings", "block"}.intersection(trained):
        decay = rates.layer_decay  # type: ignore[union-attr]
        return f"layer_decay: {decay:g} has no effect, neither blocks nor embeddings train; remove it"
    if set(trained) != {"head"}:
        return None
    if rates.lr and rates.head_lr:
        return f"lr: {rates.lr:g} has no effect beside head_lr, only the head trains; remove one of them"
    return None


def _refuse_idle_patterns(train: TrainSpec, phases: Sequence[PhasePlan]) -> None:
    """A rate for what no phase trains would be ignored."""
    trained = {name for phase in phases for name in phase.manifest.trainable}
    if idle := [pattern for pattern in train.pattern_lr if not match_names(pattern, trained)]:
        raise UserError(
            f"train.pattern_lr: {', '.join(map(repr, idle))} takes only frozen parameters, so that its rate has no "
            "effect; remove it or train them"
        )


def _phase_specs(spec: Spec, structure: Structure) -> Sequence[PhaseSpec]:
    train = spec.train
    if spec.phases == "gradual":
        _refuse_freeze(spec)
        return _gradual(train, structure)
    if spec.phases == "lp-ft":
        if train.epochs <= 1:
            raise UserError(
                f"phases: lp-ft trains the head alone for an epoch and then what freeze leaves; train.epochs: "
                f"{train.epochs:g} has nothing left for that. Give it more than 1"
            )
        probe_lr = train.head_lr or LINEAR_PROBE_LR
        probe = PhaseSpec(name="linear-probe", freeze=FreezeSpec(rule="backbone"), epochs=1, lr=probe_lr)
        tuned = PhaseSpec(name="fine-tune", freeze=spec.freeze, epochs=train.epochs - 1)
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


def _gradual(train: TrainSpec, structure: Structure) -> list[PhaseSpec]:
    """An epoch for the head alone, then one each for ever more blocks from the top, at last the whole model; epochs
    with one freeze, where there are more of them than blocks, are one phase."""
    epochs, depth = int(train.epochs), structure.depth
    if epochs < 2 or epochs != train.epochs or depth == 0:
        raise UserError(
            f"phases: gradual thaws blocks from the top, an epoch each; it needs a whole number of epochs from 2 "
            f"(train.epochs is {train.epochs:g}) and a model with numbered blocks (this one has {depth})"
        )
    if structure.shared_blocks:
        raise UserError(
            f"phases: gradual can't work with this model: blocks {ranges(structure.shared_blocks[0])} run one set of "
            "weights and thaw together. Use phases: lp-ft, which trains the head and then all"
        )
    embeddings = structure.of_kind("embeddings")
    most = depth if embeddings and embeddings.parameters else depth - 1  # with all blocks thawed that is what is left
    freezes = {"backbone": ("head", 1)}
    for epoch in range(1, epochs):
        num_blocks = max(1, round(depth * epoch / (epochs - 1)))
        partly = epoch < epochs - 1 and num_blocks <= most
        rule = f"all-but-last {num_blocks}" if partly else "none"
        name = f"top-{num_blocks}"
        if not partly and f"all-but-last {num_blocks}" in freezes:
            name = "all"  # the phase before has all blocks train, but not what is below them
        freezes[rule] = (name, freezes.get(rule, (name, 0))[1] + 1)
    return [PhaseSpec(name=name, freeze=FreezeSpec(rule=rule), epochs=count) for rule, (name, count) in freezes.items()]


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


def _warmup_steps(phase: PhaseSpec, train: TrainSpec, num_steps: int) -> int:
    warmup = int(train.warmup) if train.warmup >= 1 else int(train.warmup * num_steps)
    if warmup >= num_steps and warmup > 0:
        where = "train.warmup" if phase.warmup is None else f"phases ({phase.name}): warmup"
        whose = "" if phase.name == "train" else f" of phase {phase.name!r}"
        raise UserError(
            f"{where}: {warmup} steps leave nothing of the {num_steps} steps{whose}; use fewer, or a fraction"
        )
    return warmup
