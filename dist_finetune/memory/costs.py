"""All that a plan says about memory, traffic and compute, put together for one model, freeze and topology."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from torch import nn

from dist_finetune.freeze import Manifest
from dist_finetune.fsdp_layout import FrozenLayout
from dist_finetune.lint import below, filled_up, first_trainable_part, passes_frozen_matrices
from dist_finetune.memory.activations import Activations, Pass, fake_pass, telling_rows
from dist_finetune.memory.choice import Limits, RankMemory
from dist_finetune.memory.demand import Demand, Way, demanding, most_of
from dist_finetune.memory.forecast import Forecast, forecast, num_passed_by_backward
from dist_finetune.memory.state import StateBytes, kept_in_bf16, layout_of
from dist_finetune.memory.traffic import checkpoint_bytes
from dist_finetune.models.structure import Part, Structure
from dist_finetune.phases import PhasePlan
from dist_finetune.recompute import recomputed_blocks
from dist_finetune.spec import Strategy
from dist_finetune.tasks.names import TaskName

HOST_COPIES = 2  # in passing: the tensors of a file beside the model's, or the model beside what its node shares


@dataclass(frozen=True)
class Costs:
    """Bytes and operations of a run. What needs a pass is None where none was asked for or possible."""

    memory: dict[Strategy, RankMemory]
    """Of the phase that needs most."""
    by_phase: tuple[dict[Strategy, StateBytes], ...]
    """What a rank holds in each phase."""
    offloaded: RankMemory | None
    """What zero3 would leave on a GPU with `shard.offload: parameters`; None where the run offloads already, and where
    that can't be."""
    saved: Activations | None
    """Bytes that autograd keeps for the backward pass, parameters aside, by rows of a micro-batch."""
    activations: Activations | None
    """Most bytes that forward and backward keep alive besides state, by rows."""
    other_activations: Activations | None
    """The same with gradient checkpointing where the run has none, or without where it has."""
    activations_unknown: str | None
    """Why the model can't be run without data."""
    checkpoint_bytes: int
    host_bytes_per_node: int
    """Host memory at load, at most: one process of a node reads the whole model in fp32 (and what a checkpoint holds of
    it), the others share it."""
    forecast: Forecast | None
    forecast_filled_up: Forecast | None
    """With all frozen that trains below frozen blocks; None where nothing does."""
    cached_elements: int | None
    """Elements of the activation that enters the first part that trains, for one row of the largest shape: what the
    cache stores for it. None where nothing lies below that part, or it is not known."""
    frozen_layout: FrozenLayout
    """Under fsdp: replicated where asked for or where it fits, else shared out."""


@dataclass(frozen=True)
class PassRequest:
    """How to run a model without data: `inputs` makes those of so many rows, the loss is that of `task`, `compare`
    also tries the other setting of gradient checkpointing, for people to see."""

    inputs: Callable[[int], Any]
    gradient_checkpointing: bool
    compare: bool
    task: TaskName = "classification"


def plan_costs(
    model: nn.Module,
    structure: Structure,
    phases: Sequence[PhasePlan],
    ways: Sequence[Way],
    limits: Limits,
    micro_batch_size: int | Literal["auto"],
    autocast: bool,
    request: PassRequest | None,
    full_checkpoint: bool,
    offload: Way | None = None,
) -> Costs:
    """The costs of training the `phases` of a model on the meta device.

    Of several `ways` of one strategy the first that fits is taken, else the last; `offload` is zero3 with all that can
    be in host memory. Memory is that of the phase that needs most; what else needs a pass is told of the phase that
    trains most. Without a `request` there is no pass, and so no activations and no forecast.
    """

    def demand(phase: PhasePlan) -> Demand:
        groups = [group.names for group in phase.groups]
        layout = layout_of(model, phase.manifest, groups, autocast, _rounded(phase))
        return Demand(phase, layout, None, num_passed_by_backward(phase.manifest, structure))

    run = partial(_pass, model, structure, request, autocast, limits.device) if request else None
    checkpointing = request is not None and request.gradient_checkpointing
    every = {phase.name: demand(phase) for phase in phases}
    demands = [every[phase.name] for phase in demanding(phases)]
    if run:
        demands = [replace(each, measured=run(each.phase, checkpointing)) for each in demands]
    if run and (offload or any(way.strategy == "zero3" for way in ways)):
        demands = [
            replace(each, under_stage3=run(each.phase, checkpointing, stage3=True))
            if passes_frozen_matrices(each.phase.manifest, structure)
            else each
            for each in demands
        ]
    manifest, measured = demands[0].phase.manifest, demands[0].measured
    found = measured if isinstance(measured, Pass) else None
    other = run(demands[0].phase, not checkpointing) if run and request and request.compare and found else None
    memory: dict[Strategy, RankMemory] = {}
    by_phase: tuple[dict[Strategy, StateBytes], ...] = tuple({} for _ in phases)
    frozen_layout: FrozenLayout = "replicate"
    for way in ways:
        if way.strategy in memory and memory[way.strategy].fits is not False:
            continue
        most = most_of(demands, way, limits, micro_batch_size)
        memory[way.strategy] = most
        for states, each in zip(by_phase, every.values(), strict=True):
            states[way.strategy] = each.under(way, limits, most.micro_batch_size).state
        frozen_layout = way.frozen_layout if way.strategy == "fsdp" else frozen_layout
    return Costs(
        memory=memory,
        by_phase=by_phase,
        offloaded=most_of(demands, offload, limits, micro_batch_size) if offload else None,
        saved=found.saved if found else None,
        activations=found.peak if found else None,
        other_activations=other.peak if isinstance(other, Pass) else None,
        activations_unknown=next((each.measured for each in demands if isinstance(each.measured, str)), None),
        checkpoint_bytes=checkpoint_bytes(model, manifest, full_checkpoint),
        host_bytes_per_node=HOST_COPIES * sum(t.nbytes for t in (*model.parameters(), *model.buffers())),
        forecast=forecast(found, manifest, structure) if found else None,
        forecast_filled_up=_forecast_filled_up(found, manifest, structure) if found else None,
        cached_elements=_cached_elements(found, manifest, structure) if found else None,
        frozen_layout=frozen_layout,
    )


def _forecast_filled_up(measured: Pass, manifest: Manifest, structure: Structure) -> Forecast | None:
    filled = filled_up(manifest, structure)
    if filled.num_trainable in (0, manifest.num_trainable):
        return None
    return forecast(measured, filled, structure)


def _cached_elements(measured: Pass, manifest: Manifest, structure: Structure) -> int | None:
    first = first_trainable_part(manifest, structure)
    elements = measured.input_elements.get(first.label)
    return elements // measured.micro_batch_size if elements and below(first, structure) else None


def _rounded(phase: PhasePlan) -> Collection[str]:
    return kept_in_bf16(phase.manifest) if phase.frozen_dtype == "bf16" else frozenset()


def _pass(
    model: nn.Module,
    structure: Structure,
    request: PassRequest,
    autocast: bool,
    device: Literal["cpu", "cuda"],
    phase: PhasePlan,
    gradient_checkpointing: bool,
    stage3: bool = False,
) -> Pass | str:
    blocks: Sequence[Part] = recomputed_blocks(phase.manifest, structure) if gradient_checkpointing else ()
    return fake_pass(
        model,
        phase.manifest,
        structure.parts,
        request.inputs,
        telling_rows(model, request.inputs),
        autocast,
        device,
        recompute=blocks,
        in_bf16=_rounded(phase),
        task=request.task,
        stage3=stage3,
    )
