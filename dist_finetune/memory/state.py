"""Bytes of training state on each rank, from shapes alone, laid out as the engines lay it out.

Frozen tensors cost their weights and nothing else. The split follows the ZeRO paper (Rajbhandari et al. 2020): stage 1
shards optimizer state, stage 2 gradients too, stage 3 the weights too; padding and buckets are DeepSpeed 0.19's own.
`STATE` has one function a strategy, so that another engine adds a line.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from dist_finetune.freeze import Manifest
from dist_finetune.spec import Strategy

FP32_BYTES = 4
BF16_BYTES = 2
ADAM_MOMENTS = 2
STEP_COUNT_BYTES = 4  # Adam counts its steps in one fp32 number for each tensor that it updates
# Where autocast is on, DeepSpeed reduces the gradients of these layers in bf16, all others in fp32.
REDUCED_IN_BF16 = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Layout:
    """What the state of a rank depends on: sizes (elements) of a model's tensors and how an engine gets them."""

    groups: tuple[tuple[int, ...], ...]
    """Each trainable parameter of each optimizer group, in the optimizer's order."""
    frozen: tuple[int, ...]
    buffer_bytes: int
    """All buffers, also those that are recomputed and not saved."""
    num_reduced_in_bf16: int
    """Trainable elements whose gradients DeepSpeed sends in bf16."""
    frozen_in_bf16: tuple[int, ...] = ()
    """Frozen parameters that are kept in bf16; those in `frozen` are in fp32."""

    @property
    def trainable(self) -> int:
        """Trainable elements."""
        return sum(sum(group) for group in self.groups)

    @property
    def num_frozen(self) -> int:
        """Frozen elements."""
        return sum(self.frozen) + sum(self.frozen_in_bf16)

    @property
    def frozen_bytes(self) -> int:
        """Bytes of all frozen parameters."""
        return sum(self.frozen) * FP32_BYTES + sum(self.frozen_in_bf16) * BF16_BYTES

    @property
    def num_trainable_tensors(self) -> int:
        return sum(len(group) for group in self.groups)


@dataclass(frozen=True)
class StateBytes:
    """Bytes on the rank that holds most. The first six last; `communication` and `update` come and go in a step."""

    trainable_weights: int
    frozen_weights: int
    gradients: int
    """Held from the backward pass to the update."""
    optimizer: int
    masters: int
    """fp32 copies that a ZeRO partition updates besides the model's own weights."""
    buffers: int
    communication: int
    """Buckets and gathered weights that are there during the backward pass."""
    update: int
    """Short-lived copies of gradients while the optimizer updates."""
    padding: int
    """The part of weights, gradients, optimizer and masters that is only there to make shares even."""
    offloaded: int = 0
    """In host memory instead: what `shard.offload` moves there."""

    @property
    def total(self) -> int:
        """What training needs besides activations and short-lived buffers."""
        lasting = self.trainable_weights + self.frozen_weights + self.masters + self.buffers
        return lasting + self.gradients + self.optimizer

    def peak(self, activations: int) -> int:
        """Most bytes at once in a step, given the most that forward and backward keep alive besides state."""
        return self.total + max(activations + self.communication, self.update)


def kept_in_bf16(manifest: Manifest) -> frozenset[str]:
    """The parameters that `freeze.dtype: bf16` rounds: frozen matrices and kernels."""
    return frozenset(r.name for r in manifest.records if r.kind == "parameter" and r.frozen and len(r.shape) > 1)


def layout_of(
    model: nn.Module,
    manifest: Manifest,
    groups: Sequence[Sequence[str]],
    autocast: bool,
    rounded: Collection[str] = frozenset(),
) -> Layout:
    """The layout of a model (it may be on the meta device) with the parameter names of its optimizer groups, and of
    those that are kept in bf16."""
    sizes = {record.name: record.num_elements for record in manifest.records if record.kind == "parameter"}
    in_bf16 = set()
    if autocast:
        for path, module in model.named_modules():
            if type(module) in REDUCED_IN_BF16:
                in_bf16 |= {f"{path}.{name}".lstrip(".") for name, _ in module.named_parameters(recurse=False)}
    return Layout(
        tuple(tuple(sizes[name] for name in group) for group in groups),
        tuple(sizes[name] for name in manifest.frozen if name not in rounded),
        sum(buffer.nbytes for buffer in model.buffers()),
        sum(sizes[name] for name in manifest.trainable if name in in_bf16),
        tuple(sizes[name] for name in manifest.frozen if name in rounded),
    )


def state_bytes(
    layout: Layout,
    strategy: Strategy,
    world_size: int,
    zero: Mapping[str, Any] | None,
    accumulates: bool,
    on_host: bool = False,
) -> StateBytes:
    """State of a rank under `strategy`, without what is offloaded to host memory, which moves nothing for a rank that
    is `on_host` itself. `zero` is the `zero_optimization` section that DeepSpeed gets, or `fsdp_section`'s answer, None
    for ddp; `accumulates` says whether a step takes several micro-batches."""
    settings = zero or {}
    state = STATE[strategy](layout, world_size, settings, accumulates)
    if on_host:
        return state
    total = state.total
    if "offload_optimizer" in settings:
        state = replace(state, optimizer=0, masters=0, padding=0)
    if "offload_param" in settings or settings.get("offload"):
        whole = settings.get("whole", 0) * FP32_BYTES
        state = replace(state, trainable_weights=0, frozen_weights=whole, gradients=0, optimizer=0, padding=0)
    return replace(state, offloaded=total - state.total)


def _ddp(layout: Layout, world_size: int, zero: Mapping[str, Any], accumulates: bool) -> StateBytes:
    trainable = layout.trainable * FP32_BYTES
    return StateBytes(
        trainable_weights=trainable,
        frozen_weights=layout.frozen_bytes,
        gradients=trainable,
        optimizer=ADAM_MOMENTS * trainable + STEP_COUNT_BYTES * layout.num_trainable_tensors,
        masters=0,
        buffers=layout.buffer_bytes,
        # DDP's buckets are the gradients; those of earlier micro-batches lie beside them until they are added
        communication=trainable if world_size > 1 and accumulates else 0,
        update=0,
        padding=0,
    )


def _zero1(layout: Layout, world_size: int, zero: Mapping[str, Any], accumulates: bool) -> StateBytes:
    return _zero_1_or_2(layout, world_size, zero, accumulates, shards_gradients=False)


def _zero2(layout: Layout, world_size: int, zero: Mapping[str, Any], accumulates: bool) -> StateBytes:
    return _zero_1_or_2(layout, world_size, zero, accumulates, shards_gradients=True)


def _zero_1_or_2(
    layout: Layout, world_size: int, zero: Mapping[str, Any], accumulates: bool, shards_gradients: bool
) -> StateBytes:
    """Each group is laid end to end, padded to a multiple of 2 x world size, and cut evenly."""
    aligned, own = 0, np.zeros(world_size, dtype=np.int64)
    largest_share = 0
    for group in layout.groups:
        sizes, offsets = _flat_layout(group, world_size, zero)
        alignment = 2 * world_size
        total = -(-int(offsets[-1] + sizes[-1]) // alignment) * alignment
        aligned += total
        largest_share = max(largest_share, total // world_size)
        own += _elements_overlapping(sizes, offsets, world_size, total // world_size)
    share = aligned // world_size * FP32_BYTES
    bucket = int(zero["reduce_bucket_size"]) * FP32_BYTES * _num_buckets(layout)
    # What a bucket holds is laid end to end once more for the reduction.
    staged = min(bucket, layout.trainable * FP32_BYTES)
    own_gradients = int(own.max()) * FP32_BYTES
    in_update = largest_share * FP32_BYTES
    if shards_gradients:
        num_filled = 2 if zero["overlap_comm"] else 1  # one is filled while the other is on its way
        gradients, communication = own_gradients, num_filled * bucket + staged
        communication += own_gradients if accumulates else 0  # the next micro-batch's, before they are added
        update = in_update
    else:
        gradients, communication = layout.trainable * FP32_BYTES, staged * _num_buckets(layout)
        update = bucket + staged + own_gradients + in_update
    return StateBytes(
        trainable_weights=aligned * FP32_BYTES,
        frozen_weights=layout.frozen_bytes,
        gradients=gradients,
        optimizer=ADAM_MOMENTS * share + STEP_COUNT_BYTES * len(layout.groups),
        masters=share,
        buffers=layout.buffer_bytes,
        communication=communication,
        update=update,
        padding=(aligned - layout.trainable) * FP32_BYTES,
    )


def _zero3(layout: Layout, world_size: int, zero: Mapping[str, Any], accumulates: bool) -> StateBytes:
    """Each parameter is cut evenly, padded to a multiple of world size. Adam updates a copy of the share even where
    that is fp32: DeepSpeed means to spare it, but compares a device with its name."""
    shares = [sum(-(-n // world_size) for n in group) for group in layout.groups]
    share = sum(shares) * FP32_BYTES
    frozen = sum(-(-n // world_size) for n in layout.frozen) * FP32_BYTES
    frozen += sum(-(-n // world_size) for n in layout.frozen_in_bf16) * BF16_BYTES
    bucket = int(zero["reduce_bucket_size"])
    in_bf16, total = layout.num_reduced_in_bf16, layout.trainable
    buckets = bucket * ((FP32_BYTES if in_bf16 < total else 0) + (BF16_BYTES if in_bf16 else 0))
    staged = min(bucket, total) * FP32_BYTES  # whole gradients, until they are in a bucket
    # On the way up, what has arrived in one flat buffer is copied out of it, weight by weight; on the way down,
    # gradients are on their way instead.
    unpacked = min(total + layout.num_frozen, int(zero["stage3_prefetch_bucket_size"])) if world_size > 1 else 0
    return StateBytes(
        trainable_weights=share,
        frozen_weights=frozen,
        gradients=share,
        optimizer=ADAM_MOMENTS * share + STEP_COUNT_BYTES * len(layout.groups),
        masters=share,
        buffers=layout.buffer_bytes,
        communication=gathered_elements(layout, zero) * FP32_BYTES + max(buckets + staged, unpacked * FP32_BYTES),
        update=buckets + max(shares) * FP32_BYTES,
        padding=share - total * FP32_BYTES // world_size + frozen - layout.frozen_bytes // world_size,
    )


def _fsdp(layout: Layout, world_size: int, fsdp: Mapping[str, Any], accumulates: bool) -> StateBytes:
    """Each parameter is cut along its first dimension; rank 0 has the full shares. `fsdp` is `fsdp_section`'s."""
    share = int(fsdp["trainable_share"]) * FP32_BYTES
    frozen = int(fsdp["frozen_share"]) * layout.frozen_bytes // max(1, layout.num_frozen)
    gathered = int(fsdp["gathered"]) * FP32_BYTES
    waiting = layout.trainable * FP32_BYTES if accumulates and world_size > 1 else 0  # whole, until the one reduction
    return StateBytes(
        trainable_weights=share,
        frozen_weights=frozen,
        gradients=share,
        optimizer=ADAM_MOMENTS * share + STEP_COUNT_BYTES * layout.num_trainable_tensors,
        masters=0,
        buffers=layout.buffer_bytes,
        communication=2 * gathered + waiting,  # weights, and as much of gradients on their way
        update=0,
        padding=share - layout.trainable * FP32_BYTES // world_size,
    )


STATE: dict[Strategy, Callable[[Layout, int, Mapping[str, Any], bool], StateBytes]] = {
    "ddp": _ddp,
    "zero1": _zero1,
    "zero2": _zero2,
    "zero3": _zero3,
    "fsdp": _fsdp,
}


def gathered_elements(layout: Layout, zero: Mapping[str, Any]) -> int:
    """Most weights of other ranks that ZeRO-3 keeps on a rank: those it will use again within the reuse distance, which
    counts them on the way up and on the way down, and what it fetches ahead."""
    everything = layout.trainable + layout.num_frozen
    largest = max((*layout.frozen, *layout.frozen_in_bf16, *(n for group in layout.groups for n in group)))
    kept = int(zero["stage3_max_reuse_distance"]) // 2 + int(zero["stage3_prefetch_bucket_size"]) + 2 * largest
    return min(everything, kept)


def _num_buckets(layout: Layout) -> int:
    """DeepSpeed has a bucket for each data type that gradients are sent in."""
    return (layout.num_reduced_in_bf16 > 0) + (layout.num_reduced_in_bf16 < layout.trainable)


def _flat_layout(
    group: Sequence[int], world_size: int, zero: Mapping[str, Any]
) -> tuple[np.ndarray[Any, np.dtype[np.int64]], np.ndarray[Any, np.dtype[np.int64]]]:
    """Sizes of a group's parameters in the order of the flat tensor, and where each starts in it."""
    order = list(group)
    if zero.get("round_robin_gradients"):
        order = [n for first in range(world_size) for n in order[first::world_size]]
    sizes = np.array(order, dtype=np.int64)
    return sizes, np.concatenate([[0], np.cumsum(sizes)[:-1]])


def _elements_overlapping(
    sizes: np.ndarray[Any, np.dtype[np.int64]],
    offsets: np.ndarray[Any, np.dtype[np.int64]],
    world_size: int,
    share: int,
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """(world_size,) elements of all parameters that a rank's share has part of: their gradients are kept whole."""
    first = np.arange(world_size, dtype=np.int64) * share
    start = np.searchsorted(offsets + sizes, first, side="right")
    stop = np.searchsorted(offsets, first + share, side="left")
    sums = np.concatenate([[0], np.cumsum(sizes)])
    return sums[np.maximum(stop, start)] - sums[start]
