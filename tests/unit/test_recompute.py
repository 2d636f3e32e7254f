"""Recomputed blocks give the numbers of plain ones."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from dist_finetune import recompute
from dist_finetune.recompute import recomputed, without_statistics


def test_synchronised_batchnorm_stays_whole_while_it_is_recomputed() -> None:
    """It insists on a count of batches, also in a pass that adds nothing to it."""
    norm = nn.SyncBatchNorm(4)
    assert norm.num_batches_tracked is not None
    with without_statistics([norm]):
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


def test_what_a_block_is_given_by_name_is_seen_where_random_numbers_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's are repeated only for tensors that torch gets by position, which no CPU can show."""
    given: list[tuple[Any, ...]] = []

    def watched(function: Any, *args: Any, **options: Any) -> Any:
        given.append(args)
        return torch_checkpoint(function, *args, **options)

    monkeypatch.setattr(recompute, "checkpoint", watched)

    def block(hidden: torch.Tensor, *, mask: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return hidden * mask * scale

    hidden, mask = torch.ones(2, requires_grad=True), torch.tensor([1.0, 0.0])
    run = recomputed(block)
    run(mask=mask, hidden=hidden, scale=3.0).sum().backward()
    run(hidden, scale=3.0, mask=mask).sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.tolist() == [6.0, 0.0]
    assert [[id(value) for value in args if isinstance(value, torch.Tensor)] for args in given] == [
        [id(mask), id(hidden)],
        [id(hidden), id(mask)],
    ]
