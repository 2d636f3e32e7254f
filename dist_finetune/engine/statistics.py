"""Running statistics of BatchNorm that trains: the same on every rank, at every strategy.

On GPUs batches are normalised over all ranks (SyncBatchNorm). On the CPU, where torch has none, each rank normalises by
its own rows, and the running statistics are averaged over ranks after each step, so that evaluation, checkpoints and
the exported model do not depend on the rank. DDP alone would copy rank 0's, ZeRO and FSDP let them part.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dist_finetune.freeze import Manifest
from dist_finetune.world import sum_over_ranks


def synchronise_batchnorm(model: nn.Module, manifest: Manifest) -> None:
    """Replaces every BatchNorm whose statistics move by one over all ranks, with the same parameters and buffers."""
    from timm.layers import convert_sync_batchnorm  # which takes seconds to import

    for path, module in list(model.named_modules()):
        if path and isinstance(module, _BatchNorm) and _moves(path, manifest):
            model.set_submodule(path, convert_sync_batchnorm(module))


def moving_statistics(model: nn.Module, manifest: Manifest) -> list[torch.Tensor]:
    """Running means and variances that ranks move apart: those of BatchNorm that is neither frozen nor synchronised."""
    modules = [
        module
        for path, module in model.named_modules()
        if isinstance(module, _BatchNorm) and not isinstance(module, nn.SyncBatchNorm) and _moves(path, manifest)
    ]
    found = [getattr(module, name) for module in modules for name in ("running_mean", "running_var")]
    return [buffer for buffer in found if buffer is not None]


def average_statistics(buffers: list[torch.Tensor]) -> None:
    """Sets each buffer to its mean over ranks, in place, with one reduction. Collective where there are any."""
    if not buffers or dist.get_world_size() == 1:
        return
    mean = sum_over_ranks(torch.cat([b.float().view(-1) for b in buffers])) / dist.get_world_size()
    for buffer, part in zip(buffers, mean.split([b.numel() for b in buffers]), strict=True):
        buffer.copy_(part.view(buffer.shape))


def _moves(path: str, manifest: Manifest) -> bool:
    if manifest.mode == "train":
        return True
    return not any(path == held or path.startswith(f"{held}.") for held in manifest.held_modules)
