"""Bytes that a rank sends in one optimizer step, and bytes that a checkpoint takes."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from dist_finetune.freeze import Manifest
from dist_finetune.memory.state import ADAM_MOMENTS, BF16_BYTES, FP32_BYTES, Layout, gathered_elements
from dist_finetune.spec import Strategy


def step_traffic(
    layout: Layout,
    strategy: Strategy,
    world_size: int,
    zero: Mapping[str, Any] | None,
    num_micro_batches: int,
    num_passed: int,
) -> int:
    """Bytes one rank sends in a step with ring collectives: of n bytes, an all-reduce sends 2n(W-1)/W, a reduce-scatter
    or an all-gather n(W-1)/W.

    DDP, FSDP and ZeRO-1 reduce once a step, ZeRO-2 and 3 at every micro-batch. `num_passed` counts the weights that the
    backward pass goes through, trained or not: ZeRO-3 fetches those again that it did not keep.
    """
    if world_size == 1:
        return 0
    weights = layout.trainable * FP32_BYTES + layout.frozen_bytes
    trainable = layout.trainable * FP32_BYTES
    in_bf16 = layout.num_reduced_in_bf16
    gradients = (layout.trainable - in_bf16) * FP32_BYTES + in_bf16 * BF16_BYTES
    if strategy == "ddp":
        moved = 2 * trainable
    elif strategy in ("zero1", "zero2"):
        # DeepSpeed all-reduces a bucket even where only one rank wants the result
        moved = 2 * gradients * (num_micro_batches if strategy == "zero2" else 1) + trainable
    elif strategy == "fsdp":
        # each pass gathers a block's weights, forward and backward; gradients are reduced once a step
        gathered = int((zero or {})["sent"]) * FP32_BYTES
        moved = 2 * num_micro_batches * gathered + trainable
    else:
        again = max(0, num_passed - gathered_elements(layout, zero or {})) * FP32_BYTES
        moved = num_micro_batches * (gradients + weights + again)
    return moved * (world_size - 1) // world_size


def checkpoint_bytes(model: nn.Module, manifest: Manifest, full: bool) -> int:
    """Size of a checkpoint over all ranks, without file headers: fp32 weights and Adam moments of what trains, buffers
    that move, and with `full` frozen tensors too."""
    sizes = {name: buffer.nbytes for name, buffer in model.named_buffers()}
    moving = sum(sizes[r.name] for r in manifest.records if r.kind == "buffer" and (full or not r.frozen))
    frozen = manifest.num_frozen * FP32_BYTES if full else 0
    return manifest.num_trainable * FP32_BYTES * (1 + ADAM_MOMENTS) + moving + frozen
