"""`micro_batch_size: auto` tried out: forward and backward at the largest shape, beside what a rank will hold."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dist_finetune.engine.base import collect
from dist_finetune.engine.blocks import prepare_blocks
from dist_finetune.engine.precision import autocast_of, round_frozen
from dist_finetune.errors import PlanError
from dist_finetune.evaluate import to_device
from dist_finetune.freeze import apply_freeze, train_mode
from dist_finetune.memory.activations import drop_gradient, fake_inputs
from dist_finetune.memory.demand import demanding
from dist_finetune.models.on_meta import on_meta
from dist_finetune.models.sources import build_model, forward_logits
from dist_finetune.models.unread import skip_unread
from dist_finetune.no_memory import is_lack_of_memory
from dist_finetune.phases import PhasePlan
from dist_finetune.plan import Plan
from dist_finetune.spec import SHARDED_WEIGHTS
from dist_finetune.tasks.task import task_of
from dist_finetune.world import World, gather_objects

NO_MEMORY = "out of memory"


def tried_micro_batch(plan: Plan, world: World) -> tuple[int, str | None]:
    """The planned micro-batch, or the largest below it that every rank could run; and why a rank could not try, if one
    could not: then the plan's word stands there. Collective.

    The model is there with its shapes and zeros for weights. Each rank tries alone, with no collective that another
    rank's lack of memory could leave waiting, and with a ballast as large as the optimizer state and buckets to come.
    Under zero3 and fsdp the whole model stands in for the shards, so that what runs here runs there, too; where it
    leaves no room, that says nothing. Raises PlanError where not even the smallest runs.
    """
    planned = plan.batches.micro_batch_size
    share = plan.batches.global_batch_size // world.world_size
    sizes = [rows for rows in range(planned, 0, -1) if share % rows == 0]
    fits, untried = _largest(plan, sizes, world.device)
    least = torch.tensor(fits, device=world.device)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    if not least:
        raise PlanError(
            f"even a micro-batch of {sizes[-1]} does not fit beside the {plan.memory[plan.strategy].total / 2**30:.1f} "
            f"GiB that {plan.strategy} holds on a rank: freeze more, shard further (shard.strategy), shorten "
            "data.max_length or data.image_size, or set train.gradient_checkpointing"
        )
    # a share is a multiple of every rank's answer, and so the smallest is one of the sizes
    return int(least), next((reason for reason in gather_objects(untried) if reason), None)


def _largest(plan: Plan, sizes: Sequence[int], device: torch.device) -> tuple[int, str | None]:
    """The largest of `sizes` that runs here, 0 where none does; or the first one, and why none could be tried."""
    if plan.is_larger_than_device:
        return sizes[0], "the whole model, which a trial holds, is larger than a GPU"
    for rows in sizes:
        problem = _problem(plan, rows, device)
        if problem is None:
            return rows, None
        if problem != NO_MEMORY and rows == sizes[0]:
            return rows, problem
    if plan.strategy in SHARDED_WEIGHTS:
        return sizes[0], "the whole model, which a trial holds, leaves no room on a GPU"
    return 0, None


def _problem(plan: Plan, rows: int, device: torch.device) -> str | None:
    """What is wrong with a forward and a backward pass of so many rows, in the phases that need most: NO_MEMORY, or an
    error's words; None where they run."""
    try:
        for phase in demanding(plan.phases):
            _pass(plan, phase, rows, device)
    except Exception as error:  # a user's own model may raise anything, where a run itself does not go
        words = f"{type(error).__name__}: {error}".splitlines()[0]
        return NO_MEMORY if is_lack_of_memory(error) else words
    finally:
        collect()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)  # a run reports its own peak
    return None


def _pass(plan: Plan, phase: PhasePlan, rows: int, device: torch.device) -> None:
    model = _empty_model(plan, device)
    apply_freeze(model, phase.manifest)
    if phase.frozen_dtype == "bf16":
        round_frozen(model, phase.manifest, ())
    prepare_blocks(model, plan, phase)
    train_mode(model, phase.manifest)
    state = plan.memory[plan.strategy].state
    trainable = [p for p in model.parameters() if p.requires_grad]
    there = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    if plan.strategy in SHARDED_WEIGHTS:  # gradients too are cut as they come; the ballast has a rank's share
        for parameter in trainable:
            parameter.register_post_accumulate_grad_hook(drop_gradient)
    else:
        there += sum(p.nbytes for p in trainable)  # gradients, in the backward pass
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
    if plan.skips_unread:
        skip_unread(model)
    model.to_empty(device=device)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
    return model
