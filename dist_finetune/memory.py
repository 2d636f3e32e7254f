"""Bytes of training state on each rank, from shapes alone.

Frozen tensors cost their weights and nothing else. The split follows the ZeRO paper (Rajbhandari et al. 2020): stage 1
shards optimizer state, stage 2 gradients too, stage 3 the weights too.
"""

from dataclasses import dataclass

from dist_finetune.freeze import Manifest
from dist_finetune.spec import Strategy

FP32_BYTES = 4
ADAM_MOMENTS = 2


@dataclass(frozen=True)
class StateBytes:
    """Bytes on one rank. `masters` are the fp32 copies that a ZeRO partition trains besides the model's own weights."""

    trainable_weights: int
    frozen_weights: int
    gradients: int
    optimizer: int
    masters: int
    buffers: int

    @property
    def total(self) -> int:
        return (
            self.trainable_weights
            + self.frozen_weights
            + self.gradients
            + self.optimizer
            + self.masters
            + self.buffers
        )


def state_bytes(manifest: Manifest, strategy: Strategy, world_size: int) -> StateBytes:
    """State of one rank under `strategy`, with fp32 weights; padding of the engine's partitions is left out."""
    trainable, frozen = manifest.num_trainable * FP32_BYTES, manifest.num_frozen * FP32_BYTES
    buffers = sum(r.num_elements for r in manifest.records if r.kind == "buffer") * FP32_BYTES
    shard = -(-trainable // world_size)
    sharded_weights = strategy == "zero3"
    return StateBytes(
        trainable_weights=shard if sharded_weights else trainable,
        frozen_weights=-(-frozen // world_size) if sharded_weights else frozen,
        gradients=shard if strategy in ("zero2", "zero3") else trainable,
        optimizer=ADAM_MOMENTS * (trainable if strategy == "ddp" else shard),
        masters=0 if strategy == "ddp" else shard,
        buffers=buffers,
    )
