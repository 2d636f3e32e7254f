"""What a rank's engine really holds, in bytes, to set beside the plan."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch

from dist_finetune.engine import Engine
from dist_finetune.memory.state import StateBytes
from dist_finetune.world import World, gather_objects


@dataclass(frozen=True)
class HeldBytes:
    """Bytes of the storages on this rank, each counted once; the names are those of `StateBytes`."""

    trainable_weights: int
    frozen_weights: int
    optimizer: int
    masters: int
    buffers: int

    @property
    def total(self) -> int:
        """All of them; gradients are not there between steps."""
        return self.trainable_weights + self.frozen_weights + self.optimizer + self.masters + self.buffers


def held_bytes(engine: Engine, device: str) -> HeldBytes:
    """What the engine holds on devices of a kind ("cpu", "cuda") between two steps, after the first."""
    parameters = list(engine.module.parameters())
    pieces = list(engine.fragments())
    seen: set[int] = set()

    def new(tensors: Iterable[torch.Tensor]) -> int:
        return _new_bytes((tensor for tensor in tensors if tensor.device.type == device), seen)

    return HeldBytes(
        trainable_weights=new(_local(p) for p in parameters if p.requires_grad),
        frozen_weights=new(_local(p) for p in parameters if not p.requires_grad),
        optimizer=new(moment for piece in pieces for moment in piece.moments.values()),
        masters=new(piece.weight for piece in pieces),
        buffers=new(engine.module.buffers()),
    )


def planned_and_actual(
    planned: StateBytes, planned_peak: int | None, engine: Engine, world: World
) -> dict[str, dict[str, int | None]]:
    """{"planned": ..., "actual": ...} of the same kinds of bytes, the most that any rank holds on its device in this
    phase. Collective.

    `peak` is of the whole run, what CUDA allocated at most; on the CPU it is None, since a process has more in memory
    than tensors.
    """
    held = held_bytes(engine, world.device.type)
    peak = torch.cuda.max_memory_allocated(world.device) if world.device.type == "cuda" else None
    actual: dict[str, int | None] = {**asdict(held), "total": held.total, "peak": peak}
    ranks = gather_objects(actual)
    most = {kind: None if actual[kind] is None else max(rank[kind] or 0 for rank in ranks) for kind in actual}
    state: dict[str, int | None] = {kind: getattr(planned, kind) for kind in asdict(held)}
    total = planned.total - planned.gradients
    return {"planned": {**state, "total": total, "peak": planned_peak}, "actual": most}


def _local(parameter: torch.Tensor) -> torch.Tensor:
    """This rank's share of a parameter where ZeRO-3 or FSDP cut it, else the parameter."""
    if hasattr(parameter, "ds_tensor"):
        share: torch.Tensor = parameter.ds_tensor
        return share
    to_local = getattr(parameter, "to_local", None)
    return to_local() if to_local else parameter


def _new_bytes(tensors: Iterable[torch.Tensor], seen: set[int]) -> int:
    """Bytes of the storages of `tensors` that are not in `seen`, and adds them to it."""
    total = 0
    for tensor in tensors:
        storage = tensor.detach().untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            total += storage.nbytes()
    return total
