"""Ranks that hold the same tensors must hold the same bytes: compared every so often while training runs.

Replicas part without an error where memory flips a bit, where a rank took other code, or where something outside the
plan wrote to a weight. From then on each rank trains a model of its own and rank 0's is saved (DeepSpeed#1767).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from dist_finetune.engine import Engine
from dist_finetune.errors import TrainingError
from dist_finetune.world import World, gather_objects, settled_s

COST_SHARE = 0.004
"""Most of a run's time that comparisons may take; the first, at step 1, comes on top."""


@dataclass
class DriftCheck:
    """Compares the tensors that every rank holds whole; how often follows from what it costs."""

    world: World
    next_step: int
    """Optimizer steps after which the next comparison is due, the same on every rank."""
    _last: tuple[int, float] | None = None

    def after(self, step: int, engine: Engine) -> None:
        """Call after each optimizer step with the number of steps taken. Raises TrainingError on every rank where ranks
        differ, naming the first tensor. Collective when due."""
        if self.world.world_size == 1 or step < self.next_step:
            return
        began_s = settled_s(self.world.device)  # steps that a GPU still works on are none of the comparison's cost
        tensors = whole_tensors(engine)
        if tensors:
            _compare(step, tensors)
        ended_s = settled_s(self.world.device)
        steps, elapsed_s = 1, 0.0
        if self._last:
            steps, elapsed_s = step - self._last[0], began_s - self._last[1]
        wanted = (ended_s - began_s) * steps / (COST_SHARE * elapsed_s) if elapsed_s else 1.0
        self._last = (step, ended_s)
        self.next_step = step + max(1, int(max(gather_objects(wanted))) + 1)


def _compare(step: int, tensors: dict[str, torch.Tensor]) -> None:
    sums = checksums(list(tensors.values()))
    both = torch.stack([sums, -sums])
    dist.all_reduce(both, dist.ReduceOp.MAX)
    parted = (both[0] != -both[1]).nonzero().view(-1).tolist()
    if parted:
        first = list(tensors)[parted[0]]
        raise TrainingError(
            f"step {step}: {len(parted)} tensors differ between ranks, first {first}. Each rank trains a "
            "model of its own from here on; go on from the last checkpoint, and test this machine's memory"
        )


def whole_tensors(engine: Engine) -> dict[str, torch.Tensor]:
    """Parameters and saved buffers that every rank holds whole: all under ddp, those that are not cut under fsdp and
    zero3. Shares exist once and have nothing to be compared with, and buffers that are not saved may follow the batch,
    as rotary tables do where texts are long."""
    found = {}
    for name, tensor in engine.module.state_dict(keep_vars=True).items():
        if not hasattr(tensor, "ds_id") and not hasattr(tensor, "full_tensor") and tensor.numel():
            found[name] = tensor.detach()
    return found


def checksums(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """(N,) int64: the sum of each tensor's bits, as whole numbers, wrapped around. A flipped bit changes it."""
    return torch.stack([_bits(tensor).sum(dtype=torch.int64) for tensor in tensors])


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    whole = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[tensor.element_size()]
    return tensor.view(whole) if tensor.dim() else tensor.view(1).view(whole)
