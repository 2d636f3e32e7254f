"""How often replicas are compared: as often as 0.4 % of the time allows, however long steps and comparisons take."""

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dist_finetune import drift
from dist_finetune.drift import COST_SHARE, DriftCheck, whole_tensors
from dist_finetune.world import World

WORLD = World("none", 0, 0, 2, 2, torch.device("cpu"))


@pytest.fixture(autouse=True)
def _group() -> Iterator[None]:
    """A process group of one, which agrees with itself."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Run:
    """A run by a clock of its own: `now_s` moves by `step_s` with each step, by `cost_s` with each comparison."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.step, self.now_s, self.cost_s = 0, 0.0, 0.0
        self.compared: list[int] = []
        self.check, self._module = DriftCheck(WORLD, 1), nn.Linear(2, 2)
        monkeypatch.setattr(drift, "settled_s", lambda device: self.now_s)

    @property
    def module(self) -> nn.Module:
        """Asked for by each comparison, and by nothing else."""
        if self.compared[-1:] != [self.step]:
            self.compared.append(self.step)
            self.now_s += self.cost_s
        return self._module

    def take(self, num_steps: int, step_s: float, cost_s: float) -> None:
        self.cost_s = cost_s
        for _ in range(num_steps):
            self.step += 1
            self.now_s += step_s
            self.check.after(self.step, self)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("step_s", "cost_s", "every"), [(1.0, 0.102, 26), (0.1, 0.0102, 26), (1.0, 0.0, 1), (0.5, 0.0041, 3)]
)
def test_comparisons_take_no_more_than_their_share(
    monkeypatch: pytest.MonkeyPatch, step_s: float, cost_s: float, every: int
) -> None:
    run = Run(monkeypatch)
    run.take(300, step_s, cost_s)
    first, *later = run.compared  # at the first nothing is known of how long a step takes
    assert (first, later) == (1, list(range(3, 301, every)))
    assert cost_s <= COST_SHARE * step_s * every


def test_a_comparison_that_takes_longer_is_made_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch)
    run.take(100, 1.0, 0.0102)
    often = [1, *range(3, 101, 3)]
    assert run.compared == often
    run.take(200, 1.0, 0.102)
    assert run.compared == [*often, *range(102, 301, 26)]


def test_one_process_compares_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch)
    run.check = DriftCheck(replace(WORLD, world_size=1), 1)
    run.take(5, 1.0, 0.1)
    assert run.compared == []


def test_what_is_no_part_of_the_models_state_may_differ() -> None:
    module = nn.BatchNorm1d(2)
    module.register_buffer("table", torch.ones(2), persistent=False)
    found = whole_tensors(SimpleNamespace(module=module))  # type: ignore[arg-type]
    assert list(found) == ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
