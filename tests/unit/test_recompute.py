"""Recomputed blocks give the numbers of plain ones."""

import copy

import torch
from torch import nn

from dist_finetune.recompute import _without_statistics, recomputed


def test_synchronised_batchnorm_stays_whole_while_it_is_recomputed() -> None:
    """It insists on a count of batches, also in a pass that adds nothing to it."""
    norm = nn.SyncBatchNorm(4)
    assert norm.num_batches_tracked is not None
    with _without_statistics([norm]):
        assert norm.num_batches_tracked is not None
        norm.num_batches_tracked.add_(1)
    assert (norm.momentum, norm.num_batches_tracked.item()) == (0.1, 0)


def test_batchnorm_that_trains_moves_once() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
    again = copy.deepcopy(plain)
    norm = again[1]
    assert isinstance(norm, nn.BatchNorm2d)
    again.forward = recomputed(again.forward, [norm])  # type: ignore[method-assign]
    images = torch.randn(5, 3, 8, 8)
    for model in (plain, again):
        model(images).square().sum().backward()
    assert norm.num_batches_tracked is not None
    assert norm.num_batches_tracked.item() == 1
    for (name, one), other in zip(plain.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    for one, other in zip(plain.parameters(), again.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.equal(one.grad, other.grad)
