"""All that a plan says about memory, traffic and compute, put together for one model, freeze and topology."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import nn

from dist_finetune.fsdp_layout import FrozenLayout
from dist_finetune.memory.activations import Pass, fake_pass
from dist_finetune.memory.choice import Activations, Limits, RankMemory, memory_of
from dist_finetune.memory.forecast import Forecast, forecast, num_passed_by_backward
from dist_finetune.memory.state import layout_of, state_bytes
from dist_finetune.memory.traffic import checkpoint_bytes, step_traffic
from dist_finetune.models.structure import Structure
from dist_finetune.phases import PhasePlan
from dist_finetune.spec import Strategy

FIT_ROWS = (2, 4)  # bytes grow evenly with the rows; a single row may take other kernels


@dataclass(frozen=True)
class Costs:
    """Bytes and operations of a run. What needs a pass is None where none was asked for or possible."""

    memory: dict[Strategy, RankMemory]
    saved_bytes_per_row: int | None
    """Kept for the backward pass for each row of a micro-batch, parameters aside."""
    activations_unknown: str | None
    """Why the model can't be run on fake tensors."""
    checkpoint_bytes: int
    host_bytes_per_node: int
    """Host memory at load: every rank reads the whole model in fp32 before it is moved or sharded."""
    forecast: Forecast | None
    frozen_layout: FrozenLayout
    """Under fsdp: replicated where asked for or where it fits, else shared out."""


def plan_costs(
    model: nn.Module,
    structure: Structure,
    phase: PhasePlan,
    layouts: Mapping[Strategy, Sequence[Mapping[str, Any] | None]],
    limits: Limits,
    micro_batch_size: int | Literal["auto"],
    autocast: bool,
    inputs: Callable[[int], Any] | None,
    processes_per_node: int,
    full_checkpoint: bool,
) -> Costs:
    """The costs of training `phase` of a model on the meta device, under every strategy that is a key of `layouts`.

    `layouts` holds the section that DeepSpeed would get, those of `fsdp_section` (the first that fits is taken, else
    the last), None for ddp. `inputs` makes the inputs of so many rows; None leaves out the pass, and with it
    activations and forecast.
    """
    manifest = phase.manifest
    layout = layout_of(model, manifest, [group.names for group in phase.groups], autocast)
    passes = _passes(model, structure, phase, limits, micro_batch_size, autocast, inputs) if inputs else ()
    measured = passes if isinstance(passes, tuple) else ()
    passed = num_passed_by_backward(manifest, structure)
    activations = _fit([(p.micro_batch_size, p.peak_bytes) for p in measured]) if measured else None
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
    saved = _fit([(p.micro_batch_size, p.saved_bytes) for p in measured]) if measured else None
    return Costs(
        memory=memory,
        saved_bytes_per_row=round(saved.per_row) if saved else None,
        activations_unknown=passes if isinstance(passes, str) else None,
        checkpoint_bytes=checkpoint_bytes(model, manifest, full_checkpoint),
        host_bytes_per_node=processes_per_node * sum(t.nbytes for t in (*model.parameters(), *model.buffers())),
        forecast=forecast(measured[0], manifest, structure) if measured else None,
        frozen_layout=frozen_layout,
    )


def _passes(
    model: nn.Module,
    structure: Structure,
    phase: PhasePlan,
    limits: Limits,
    micro_batch_size: int | Literal["auto"],
    autocast: bool,
    inputs: Callable[[int], Any],
) -> tuple[Pass, ...] | str:
    """A pass at the micro-batch that will run, or two where it is still to be chosen; why not, where that fails."""
    if micro_batch_size == "auto":
        sizes = limits.micro_batches()
        rows = FIT_ROWS if limits.memory_bytes is not None and len(sizes) > 1 else (sizes[-1],)
    else:
        rows = (micro_batch_size,)
    found = []
    for size in rows:
        result = fake_pass(model, phase.manifest, structure.parts, inputs, size, autocast, limits.device)
        if isinstance(result, str):
            return result
        found.append(result)
    return tuple(found)


def _fit(points: list[tuple[int, int]]) -> Activations:
    """The line through one point and the origin, or through two."""
    (rows, num_bytes), *more = points
    if not more:
        return Activations(0.0, num_bytes / rows)
    ((other_rows, other_bytes),) = more
    slope = (other_bytes - num_bytes) / (other_rows - rows)
    return Activations(num_bytes - slope * rows, slope)
