"""Steps so small that every process computes them whole, rather than wait for the others' share of the gradients.

The step of a head on stored activations is a millisecond of arithmetic, and processes of one machine that meet to add
up its gradients wait longer for each other than that. So each takes every step as one process does, with the rows of
all ranks and the random numbers of the first: the same weights on each, and nothing is sent. GPUs exchange in less time
than a step takes to start, and machines may round differently: there each rank keeps to its share.
"""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dist_finetune.data.loading import Rows
from dist_finetune.engine.statistics import moving_statistics
from dist_finetune.models.sources import forward_logits
from dist_finetune.phases import PhasePlan
from dist_finetune.plan import Plan
from dist_finetune.world import World

MOST_FLOPS = 1e8
"""Most floating point operations of the other ranks' shares in a step: a millisecond or two of one core."""
PROBE_ROWS = 4


def takes_whole_steps(plan: Plan, phase: PhasePlan, tail: nn.Module, rows: Rows, world: World) -> bool:
    """True where each rank had better compute all of a step of `tail`, which is fed with stored `rows`."""
    others = world.world_size - 1
    if plan.strategy != "ddp" or world.device.type != "cpu" or world.num_nodes > 1:
        return False
    if not others or moving_statistics(tail, phase.manifest):  # BatchNorm normalises by the rows of a pass
        return False
    batch = rows.first_batch(PROBE_ROWS)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        forward_logits(tail, batch["inputs"])
    row_flops = 3 * counter.get_total_flops() / len(batch["labels"])  # forward, and twice as much backward
    return row_flops * plan.batches.global_batch_size * others / world.world_size <= MOST_FLOPS
