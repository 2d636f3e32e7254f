"""`micro_batch_size: auto` tried out: forward and backward at the largest shape, beside what a rank will hold."""

import gc
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dist_finetune.engine.blocks import prepare_blocks
from dist_finetune.engine.precision import autocast_of, round_frozen
from dist_finetune.errors import PlanError
from dist_finetune.evaluate import to_device
from dist_finetune.freeze import apply_freeze, train_mode
from dist_finetune.memory.activations import fake_inputs
from dist_finetune.memory.demand import demanding
from dist_finetune.models.on_meta import on_meta
from dist_finetune.models.sources import build_model, forward_logits
from dist_finetune.phases import PhasePlan
from dist_finetune.plan import Plan
from dist_finetune.tasks.task import task_of
from dist_finetune.world import World

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "could not create a memory object")


def tried_micro_batch(plan: Plan, world: World) -> int:
    """The planned micro-batch, or the largest below it that every rank could run. Collective.

    The model is there with its shapes and zeros for weights. Each rank tries alone, with no collective that another
    rank's lack of memory could leave waiting, and with a ballast as large as the optimizer state and buckets to come.
    Under zero3 and fsdp the whole model stands in for the shards, so that what runs here runs there, too; where the
    model itself is larger than a device, the plan's word stands. Raises PlanError where not even the smallest runs.
    """
    planned = plan.batches.micro_batch_size
    share = plan.batches.global_batch_size // world.world_size
    sizes = [rows for rows in range(planned, 0, -1) if share % rows == 0]
    fits = planned if _is_larger_than_device(plan) else next((n for n in sizes if _runs(plan, n, world.device)), 0)
    least = torch.tensor(fits, device=world.device)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    if not least:
        raise PlanError(
            f"even a micro-batch of {sizes[-1]} does not fit beside the {plan.memory[plan.strategy].total / 2**30:.1f} "
            f"GiB that {plan.strategy} holds on a rank: freeze more, shard further (shard.strategy), shorten "
            "data.max_length or data.image_size, or set train.gradient_checkpointing"
        )
    # a share is a multiple of every rank's answer, and so the smallest is one of the sizes
    return int(least)


def _is_larger_than_device(plan: Plan) -> bool:
    limit = plan.topology.device_memory_bytes
    return limit is not None and plan.structure.num_params * 4 > limit


def _runs(plan: Plan, rows: int, device: torch.device) -> bool:
    """True where a forward and a backward pass of so many rows fit into memory, in the phases that need most."""
    try:
        for phase in demanding(plan.phases):
            _pass(plan, phase, rows, device)
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError) or any(words in str(error).lower() for words in OUT_OF_MEMORY):
            return False
        raise
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)  # a run reports its own peak
    return True


def _pass(plan: Plan, phase: PhasePlan, rows: int, device: torch.device) -> None:
    model = _empty_model(plan, device)
    apply_freeze(model, phase.manifest)
    if phase.frozen_dtype == "bf16":
        round_frozen(model, phase.manifest, ())
    prepare_blocks(model, plan, phase)
    train_mode(model, phase.manifest)
    state = plan.memory[plan.strategy].state
    there = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    there += sum(p.nbytes for p in model.parameters() if p.requires_grad)  # gradients, in the backward pass
    ballast = torch.empty(max(0, state.total + state.communication - there), dtype=torch.uint8, device=device)
    batch: Any = to_device(fake_inputs(plan.card, plan.data.max_length, plan.data.image_size)(rows), device)
    with autocast_of(plan)():
        logits = forward_logits(model, batch)
    task = task_of(plan.data.task)
    task.loss(logits.float(), task.blank(logits.float())).backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # what has been queued must have run, too
    del ballast


def _empty_model(plan: Plan, device: torch.device) -> nn.Module:
    """The model with zeros for weights; zeros are valid positions and indices, too, where buffers hold such."""
    with on_meta():
        model = build_model(plan.card, plan.spec.model, plan.data.classes)
    model.to_empty(device=device)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
    return model
