"""Which phases decide what memory a run needs, and what they need together."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from dist_finetune.freeze import Manifest
from dist_finetune.fsdp_layout import FrozenLayout
from dist_finetune.memory.activations import Pass
from dist_finetune.memory.choice import Limits, RankMemory, memory_of
from dist_finetune.memory.state import Layout, state_bytes
from dist_finetune.memory.traffic import step_traffic
from dist_finetune.phases import PhasePlan
from dist_finetune.spec import Strategy

Section = Mapping[str, Any] | None
"""What an engine's memory depends on besides sizes: what DeepSpeed gets as `zero_optimization`, or the answer of
`fsdp_section`; None for ddp."""


def demanding(phases: Sequence[PhasePlan]) -> list[PhasePlan]:
    """The phases that decide what memory a run needs, the one that trains most first. A phase that trains nothing that
    another does not train needs no more than that one in anything."""
    found: list[PhasePlan] = []
    for phase in sorted(phases, key=lambda phase: phase.manifest.num_trainable, reverse=True):
        trains = set(phase.manifest.trainable)
        if not any(trains <= set(other.manifest.trainable) for other in found):
            found.append(phase)
    return found


@dataclass(frozen=True)
class Demand:
    """What the bytes of a phase follow from."""

    phase: PhasePlan
    layout: Layout
    measured: Pass | str | None
    """Its pass without data, why it can't be run, or None where none was asked for."""
    num_passed: int
    """Elements of all parameters that the backward pass goes through."""
    under_stage3: Pass | str | None = None
    """The pass as DeepSpeed's stage 3 runs it; None where that is no other."""

    def under(self, way: "Way", limits: Limits, micro_batch_size: int | Literal["auto"]) -> RankMemory:
        """What a rank needs in this phase."""
        section = way.section(self.phase.manifest)
        measured = (self.under_stage3 if way.strategy == "zero3" else None) or self.measured
        state = partial(state_bytes, self.layout, way.strategy, limits.world_size, section)
        return memory_of(
            partial(state, on_host=limits.device == "cpu"),
            lambda count: step_traffic(self.layout, way.strategy, limits.world_size, section, count, self.num_passed),
            measured.peak if isinstance(measured, Pass) else None,
            limits,
            micro_batch_size,
        )


@dataclass(frozen=True)
class Way:
    """A strategy, and how it lays out a phase that is frozen so."""

    strategy: Strategy
    section: Callable[[Manifest], Section]
    frozen_layout: FrozenLayout = "replicate"
    """Under fsdp."""


def most_of(demands: Sequence[Demand], way: Way, limits: Limits, micro_batch_size: int | Literal["auto"]) -> RankMemory:
    """The memory of the phase that needs most, at a micro-batch that all phases can have."""
    found = [demand.under(way, limits, micro_batch_size) for demand in demands]
    rows = min(memory.micro_batch_size for memory in found)
    if any(memory.micro_batch_size != rows for memory in found):
        found = [demand.under(way, limits, rows) for demand in demands]
    most = max(range(len(found)), key=lambda i: found[i].needed)
    return replace(found[most], phase=demands[most].phase.name) if len(found) > 1 else found[most]
