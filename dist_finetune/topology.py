"""Where a run will live: nodes, processes and the device of each."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from dist_finetune.world import World, gather_objects


@dataclass(frozen=True)
class Topology:
    """Where a run will live. `device_memory_bytes` is None where no limit is known."""

    num_nodes: int = 1
    processes_per_node: int = 1
    device: Literal["cpu", "cuda"] = "cpu"
    device_memory_bytes: int | None = None
    supports_bf16: bool = True
    is_seen: bool = True
    """False for GPUs of another machine: nothing could ask whether they have bf16, as all since 2020 (Ampere) do."""
    has_amx: bool = False
    """The CPU has matrix units for bf16."""

    @property
    def world_size(self) -> int:
        return self.num_nodes * self.processes_per_node


def local_topology(processes: int = 1, num_nodes: int = 1) -> Topology:
    """The topology of this machine's device with so many processes on a node."""
    if not torch.cuda.is_available():
        return Topology(num_nodes, processes, "cpu", has_amx=torch.cpu._is_amx_tile_supported())
    memory = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return Topology(num_nodes, processes, "cuda", memory, has_bf16())


def has_bf16() -> bool:
    """Whether the GPU itself computes in bf16. Older ones (V100, T4) emulate it, slower than fp32."""
    return torch.cuda.is_bf16_supported(including_emulation=False)


def job_topology(world: World) -> Topology:
    """The topology of a job, the same on every rank where their devices differ: what each of them has. Collective."""
    own = local_topology(world.local_world_size, world.num_nodes)
    return least_of(own, gather_objects(own))


def least_of(own: Topology, every: Sequence[Topology]) -> Topology:
    """`own` with the least memory of `every` one, and bf16 and AMX only where all have it: one plan for all ranks asks
    no more than the weakest can give."""
    return replace(
        own,
        device_memory_bytes=min((t.device_memory_bytes for t in every if t.device_memory_bytes), default=None),
        supports_bf16=all(t.supports_bf16 for t in every),
        has_amx=all(t.has_amx for t in every),
    )
