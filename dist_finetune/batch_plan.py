"""Batch arithmetic: how many rows a rank takes at once, and how many steps an epoch has."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dist_finetune.errors import UserError
from dist_finetune.memory.choice import Limits, RankMemory, rows_in_caches
from dist_finetune.spec import Spec
from dist_finetune.topology import Topology

if TYPE_CHECKING:
    from dist_finetune.plan import DataPlan


@dataclass(frozen=True)
class BatchPlan:
    """Batch arithmetic: global_batch_size = micro_batch_size x gradient_accumulation_steps x world_size."""

    global_batch_size: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    eval_batch_size: int
    steps_per_epoch: int
    last_batch_size: int
    micro_batch_tokens: int | None = None
    """Texts at `micro_batch_size: auto`: the tokens that bound a micro-batch, padding among them. Short rows then take
    fewer micro-batches than planned, in no more memory. None where rows bound it."""


def rows_per_rank(spec: Spec, topology: Topology) -> int:
    """Rows of a global batch that each rank takes, with the micro-batch checked against them where the user set it.

    Raises UserError where the processes can't share the batch evenly, or a rank's micro-batches its share.
    """
    train, world_size = spec.train, topology.world_size
    share = train.rows_per_process(world_size)
    if train.micro_batch_size != "auto" and share % train.micro_batch_size:
        small = [n for n in range(1, math.isqrt(share) + 1) if share % n == 0]
        works = ", ".join(map(str, sorted({*small, *(share // n for n in small)})))
        raise UserError(
            f"train.micro_batch_size: {train.micro_batch_size} does not divide the {share} samples that each of "
            f"{world_size} processes takes a step (global_batch_size {train.global_batch_size}); use one of {works}"
        )
    return share


def steps_per_epoch(spec: Spec, num_rows: int) -> int:
    """Optimizer steps of a pass over so many training rows."""
    return -(-num_rows // spec.train.global_batch_size)


def plan_batches(spec: Spec, data: "DataPlan", limits: Limits, memory: RankMemory) -> BatchPlan:
    """The batches of a run whose ranks take `memory.micro_batch_size` of their rows at once."""
    train, num_rows, micro = spec.train, data.num_rows["train"], memory.micro_batch_size
    steps = steps_per_epoch(spec, num_rows)
    if train.eval_batch_size != "auto":
        eval_batch = train.eval_batch_size
    elif limits.device == "cpu" and data.image_size:
        eval_batch = rows_in_caches(data.image_size)
    else:
        eval_batch = _eval_rows(memory, limits.usable_bytes)
    last = num_rows - (steps - 1) * train.global_batch_size
    accumulated = limits.rows_per_rank // micro
    return BatchPlan(
        train.global_batch_size,
        micro,
        accumulated,
        eval_batch,
        steps,
        last,
        micro_batch_tokens(spec, data, micro, accumulated),
    )


def micro_batch_tokens(spec: Spec, data: "DataPlan", micro: int, accumulated: int) -> int | None:
    """Tokens that a micro-batch of texts holds at most, where its rows are ours to choose and there are several."""
    is_ours = spec.train.micro_batch_size == "auto" and accumulated > 1
    return micro * data.max_length if is_ours and data.max_length else None


def _eval_rows(memory: RankMemory, usable_bytes: int | None) -> int:
    """Rows of a pass without gradients: many, and where a limit is known no more than training would have room for,
    which keeps more of each row."""
    micro = memory.micro_batch_size
    wanted = max(64, 2 * micro)
    if usable_bytes is None:
        return wanted
    if not memory.activations:
        return 2 * micro
    room = usable_bytes - memory.state.total - memory.state.communication
    return max(micro, min(wanted, micro * room // memory.activations))
