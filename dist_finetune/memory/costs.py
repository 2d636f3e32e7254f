"""All that a plan says about memory, traffic and compute, put together for one model, freeze and topology."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import nn

from dist_finetune.freeze import Manifest
from dist_finetune.fsdp_layout import FrozenLayout
from dist_finetune.lint import below, first_trainable_part
from dist_finetune.memory.activations import Pass, fake_pass
from dist_finetune.memory.choice import Activations, Limits, RankMemory, memory_of
from dist_finetune.memory.forecast import Forecast, forecast, num_passed_by_backward
from dist_finetune.memory.state import kept_in_bf16, layout_of, state_bytes
from dist_finetune.memory.traffic import checkpoint_bytes, step_traffic
from dist_finetune.models.structure import Part, Structure
from dist_finetune.phases import PhasePlan
from dist_finetune.recompute import recomputed_blocks
from dist_finetune.spec import Strategy
from dist_finetune.tasks.names import TaskName

HOST_COPIES = 2  # in passing: the tensors of a file beside the model's, or the model beside what its node shares
FIT_ROWS = (2, 4)  # bytes grow evenly with the rows; a single row may take other kernels


@dataclass(frozen=True)
class Costs:
    """Bytes and operations of a run. What needs a pass is None where none was asked for or possible."""

    memory: dict[Strategy, RankMemory]
    saved: Activations | None
    """Bytes that autograd keeps for the backward pass, parameters aside, by rows of a micro-batch."""
    activations: Activations | None
    """Most bytes that forward and backward keep alive besides state, by rows."""
    other_activations: Activations | None
    """The same with gradient checkpointing where the run has none, or without where it has; from one size only."""
    activations_unknown: str | None
    """Why the model can't be run on fake tensors."""
    checkpoint_bytes: int
    host_bytes_per_node: int
    """Host memory at load, at most: one process of a node reads the whole model in fp32 (and what a checkpoint holds of
    it), the others share it."""
    forecast: Forecast | None
    cached_elements: int | None
    """Elements of the activation that enters the first part that trains, for one row of the largest shape: what the
    cache stores for it. None where nothing lies below that part, or it is not known."""
    frozen_layout: FrozenLayout
    """Under fsdp: replicated where asked for or where it fits, else shared out."""


@dataclass(frozen=True)
class PassRequest:
    """How to run a model on fake tensors: `inputs` makes those of so many rows, the loss is that of `task`, `compare`
    also tries the other setting of gradient checkpointing, for people to see."""

    inputs: Callable[[int], Any]
    gradient_checkpointing: bool
    compare: bool
    task: TaskName = "classification"


def plan_costs(
    model: nn.Module,
    structure: Structure,
    phase: PhasePlan,
    layouts: Mapping[Strategy, Sequence[Mapping[str, Any] | None]],
    limits: Limits,
    micro_batch_size: int | Literal["auto"],
    autocast: bool,
    request: PassRequest | None,
    full_checkpoint: bool,
) -> Costs:
    """The costs of training `phase` of a model on the meta device, under every strategy that is a key of `layouts`.

    `layouts` holds the section that DeepSpeed would get, those of `fsdp_section` (the first that fits is taken, else
    the last), None for ddp. Without a `request` there is no pass, and so no activations and no forecast.
    """
    manifest = phase.manifest
    rounded = kept_in_bf16(manifest) if phase.frozen_dtype == "bf16" else frozenset()
    layout = layout_of(model, manifest, [group.names for group in phase.groups], autocast, rounded)
    passes: tuple[Pass, ...] | str = ()
    other: tuple[Pass, ...] | str = ()
    if request:
        run = partial(_passes, model, structure, phase, request, autocast, limits.device, rounded)
        sizes = _sizes(limits, micro_batch_size)
        passes = run(request.gradient_checkpointing, sizes)
        if request.compare and not isinstance(passes, str):
            other = run(not request.gradient_checkpointing, sizes[-1:])
    measured = passes if isinstance(passes, tuple) else ()
    activations = _line([(p.micro_batch_size, p.peak_bytes) for p in measured])
    passed = num_passed_by_backward(manifest, structure)
    memory: dict[Strategy, RankMemory] = {}
    frozen_layout: FrozenLayout = "replicate"
    for strategy, sections in layouts.items():
        for section in sections:
            memory[strategy] = memory_of(
                partial(state_bytes, layout, strategy, limits.world_size, section),
                lambda count, s=strategy, z=section: step_traffic(layout, s, limits.world_size, z, count, passed),  # type: ignore[misc]
                activations,
                limits,
                micro_batch_size,
            )
            if strategy == "fsdp":
                frozen_layout = (section or {})["frozen_layout"]
            if memory[strategy].fits is not False:
                break
    return Costs(
        memory=memory,
        saved=_line([(p.micro_batch_size, p.saved_bytes) for p in measured]),
        activations=activations,
        other_activations=_line([(p.micro_batch_size, p.peak_bytes) for p in other if isinstance(p, Pass)]),
        activations_unknown=passes if isinstance(passes, str) else None,
        checkpoint_bytes=checkpoint_bytes(model, manifest, full_checkpoint),
        host_bytes_per_node=HOST_COPIES * sum(t.nbytes for t in (*model.parameters(), *model.buffers())),
        forecast=forecast(measured[0], manifest, structure) if measured else None,
        cached_elements=_cached_elements(measured[0], manifest, structure) if measured else None,
        frozen_layout=frozen_layout,
    )


def _cached_elements(measured: Pass, manifest: Manifest, structure: Structure) -> int | None:
    first = first_trainable_part(manifest, structure)
    elements = measured.input_elements.get(first.label)
    return elements // measured.micro_batch_size if elements and below(first, structure) else None


def _sizes(limits: Limits, micro_batch_size: int | Literal["auto"]) -> tuple[int, ...]:
    """The micro-batch that will run, or two sizes where it is still to be chosen."""
    if micro_batch_size != "auto":
        return (micro_batch_size,)
    sizes = limits.micro_batches()
    return FIT_ROWS if limits.memory_bytes is not None and len(sizes) > 1 else (sizes[-1],)


def _passes(
    model: nn.Module,
    structure: Structure,
    phase: PhasePlan,
    request: PassRequest,
    autocast: bool,
    device: Literal["cpu", "cuda"],
    rounded: Collection[str],
    gradient_checkpointing: bool,
    sizes: Sequence[int],
) -> tuple[Pass, ...] | str:
    """A pass of each size, or why one failed."""
    blocks: Sequence[Part] = recomputed_blocks(phase.manifest, structure) if gradient_checkpointing else ()
    found = []
    for rows in sizes:
        result = fake_pass(
            model,
            phase.manifest,
            structure.parts,
            request.inputs,
            rows,
            autocast,
            device,
            recompute=blocks,
            in_bf16=rounded,
            task=request.task,
        )
        if isinstance(result, str):
            return result
        found.append(result)
    return tuple(found)


def _line(points: list[tuple[int, int]]) -> Activations | None:
    """The line through one point and the origin, or through two; None without a point."""
    if not points:
        return None
    (rows, num_bytes), *more = points
    if not more:
        return Activations(0.0, num_bytes / rows)
    ((other_rows, other_bytes),) = more
    slope = (other_bytes - num_bytes) / (other_rows - rows)
    return Activations(num_bytes - slope * rows, slope)
