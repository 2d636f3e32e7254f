"""Proof that what is frozen did not move: a digest of every frozen tensor and buffer at load, compared at every save.

Names and digests go to freeze.json and summary.json, so that anyone can check a saved model against its source.
"""

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from dist_finetune.errors import TrainingError
from dist_finetune.freeze import Manifest
from dist_finetune.world import World, gather_objects

if TYPE_CHECKING:
    from dist_finetune.engine import Engine


def digest_tensor(tensor: torch.Tensor) -> str:
    """sha256 of a tensor's dtype, shape and bytes."""
    data = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{data.dtype} {tuple(data.shape)} ".encode())
    if data.numel():
        digest.update(data.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def digest_frozen(model: nn.Module, manifest: Manifest) -> dict[str, str]:
    """Digest of each frozen parameter and buffer of a whole model, by name, in the manifest's order."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: digest_tensor(tensors[name]) for name in (*manifest.frozen, *manifest.frozen_buffers)}


def verify_frozen(engine: "Engine", frozen_digests: Mapping[str, str], world: World) -> tuple[str, ...]:
    """Compares every frozen tensor and buffer that the ranks hold, on each rank, with its digest.

    Returns the names compared: all but those of a cached prefix, which `save_model` compares in the export. Collective
    (gathers what is sharded). Raises TrainingError that names the tensors that moved, and the rank.
    """
    tensors = dict(engine.module.named_parameters()) | dict(engine.module.named_buffers())
    held = [name for name in frozen_digests if name in tensors]
    moved = []
    for name in held:
        with engine.gathered(tensors[name]) as whole:
            if digest_tensor(whole) != frozen_digests[name]:
                moved.append(name)
    for rank, names in enumerate(gather_objects(moved)):
        if names:
            raise TrainingError(
                f"{len(names)} frozen tensors changed in training on rank {rank}, first {names[0]}: the run is not to "
                "be trusted. Something outside the plan wrote to them; nothing was exported."
            )
    return tuple(held)
