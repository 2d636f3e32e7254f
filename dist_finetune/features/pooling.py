"""From the output of a depth, whatever its layout, to one vector a sample."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dist_finetune.errors import UserError
from dist_finetune.spec_features import Pool

PYRAMID_CELLS = (1, 2)  # spatial pyramid pooling (He et al. 2014, arXiv:1406.4729), its two coarsest levels


def pooled(output: Tensor, pool: Pool, mask: Tensor | None, num_rows: int, label: str) -> Tensor:
    """float32 (B, D) of tokens (B, T, D), a feature map (B, C, H, W) or (B, H, W, C), or vectors (B, D), which stay.

    `mask` (B, T) is 1 for tokens that count. Raises UserError where `pool` means nothing for such an output.
    """
    if output.shape[0] != num_rows:
        raise UserError(
            f"features.at: {label} gives {tuple(output.shape)} for a batch of {num_rows}: the batch is not its first "
            "dimension, so its rows can't be told apart; take the depth head"
        )
    values = output.float()
    if values.ndim == 2:
        return values
    if values.ndim == 3:
        return _tokens(values, pool, mask, label)
    if values.ndim == 4:
        return _feature_map(_channels_first(values), pool, label)
    raise UserError(f"features.at: {label} gives a tensor of {values.ndim} dimensions; 2, 3 and 4 can be pooled")


def _tokens(values: Tensor, pool: Pool, mask: Tensor | None, label: str) -> Tensor:
    if mask is None:
        mask = torch.ones(values.shape[:2], device=values.device)
    if values.shape[1] < mask.shape[1]:
        raise UserError(
            f"features.at: {label} has {values.shape[1]} positions for {mask.shape[1]} tokens, so it can't be told "
            "which of them count; take the depth head"
        )
    values = values[:, : mask.shape[1]]  # some models pad to the width of their attention window
    counts = mask.unsqueeze(-1).to(values.dtype)
    if pool == "cls":
        first = mask.argmax(dim=1)  # the first token that counts: texts may be padded on the left
        return values[torch.arange(len(values), device=values.device), first]
    if pool == "max":
        return values.masked_fill(counts == 0, float("-inf")).amax(dim=1)
    if pool in ("mean", "auto"):
        return (values * counts).sum(dim=1) / counts.sum(dim=1).clamp(min=1)
    raise UserError(f"features.pool: {pool} needs a feature map, and {label} gives tokens; use mean, cls or max")


def _feature_map(values: Tensor, pool: Pool, label: str) -> Tensor:
    by_pool: dict[str, Callable[[Tensor], Tensor]] = {
        "auto": _average,
        "mean": _average,
        "gap": _average,
        "max": lambda maps: maps.amax(dim=(2, 3)),
        "pyramid": _pyramid,
    }
    if pool not in by_pool:
        raise UserError(
            f"features.pool: {pool} needs tokens, and {label} gives a feature map; use {', '.join(by_pool)}"
        )
    return by_pool[pool](values)


def _average(maps: Tensor) -> Tensor:
    return maps.mean(dim=(2, 3))


def _pyramid(maps: Tensor) -> Tensor:
    """(B, 5C): the averages of the whole map and of its quarters."""
    return torch.cat([nn.functional.adaptive_avg_pool2d(maps, cells).flatten(1) for cells in PYRAMID_CELLS], dim=1)


def _channels_first(values: Tensor) -> Tensor:
    """Swin and its like put channels last: there the second and third dimension agree, and the fourth does not."""
    _, one, two, three = values.shape
    return values.permute(0, 3, 1, 2) if one == two != three else values
