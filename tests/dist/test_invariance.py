"""The same numbers however a training is run: models by freezes by strategies by processes by accumulation by rows.

`benchmarks/invariance.py` runs the full product and prints a table.
"""

from pathlib import Path

import pytest
import torch
from invariance.cases import FREEZES, MODELS, ROWS, STRATEGIES, WORLD_SIZES, Case, few, full_product, pairwise
from invariance.compare import TOLERANCES, Outcome, beyond, compare
from invariance.suite import run_cases

NAN = float("nan")


def _check(cases: list[Case], folder: Path, timeout_s: float, num_gpus: int = 0) -> None:
    results = run_cases(cases, folder, timeout_s, num_gpus)
    problems = [f"{result.case.name}: {result.problem}" for result in results if result.problem]
    assert not problems, "\n".join(problems)
    compared = [result for result in results if result.distance]
    assert {result.case for result in compared} >= {case for case in cases if case.strategy != "ddp"}


@pytest.mark.covered
def test_a_few_ways_at_one_and_two_processes(tmp_path: Path) -> None:
    _check(few(), tmp_path, 900)


@pytest.mark.dist
def test_every_pair_of_choices(tmp_path: Path) -> None:
    _check(pairwise(), tmp_path, 1800)


@pytest.mark.dist
@pytest.mark.gpu
def test_a_few_ways_on_gpus(tmp_path: Path) -> None:
    num_gpus = torch.cuda.device_count()
    if not num_gpus:
        pytest.skip("needs CUDA devices: the same numbers with NCCL and GPU kernels, at the tolerances of compare.py")
    _check([case for case in few() if case.world_size <= num_gpus], tmp_path, 900, num_gpus)


def test_covers_hold_what_they_promise() -> None:
    product, cover, small = full_product(), pairwise(), few()
    assert len(product) > 3000
    assert len(cover) == len(set(cover)) == 122
    assert set(small) <= set(cover)
    shared_out = [c for c in cover if c.world_size > 1]
    sharded = {(c.freeze, c.strategy) for c in product if not c.strategy.endswith("offload")}
    assert {(c.freeze, c.strategy) for c in shared_out} >= sharded
    assert {(c.freeze, c.strategy) for c in cover} == {(c.freeze, c.strategy) for c in product}
    assert {(c.model, c.strategy) for c in cover} == {(m, s) for m in MODELS for s in STRATEGIES}
    assert {(c.strategy, c.world_size) for c in cover} == {(s, w) for s in STRATEGIES for w in WORLD_SIZES}
    for part in (lambda c: c.strategy, lambda c: c.world_size, lambda c: c.accumulation, lambda c: c.rows):
        pairs = {(c.loss, part(c)) for c in product}
        assert {loss for loss, _ in pairs} == {"tokens", "samples"}
        assert {(c.loss, part(c)) for c in cover} == pairs
    assert {c.loss for c in small} == {"tokens", "samples"}
    assert {c.freeze for c in small} == set(FREEZES)
    assert {c.strategy for c in small} == set(STRATEGIES)
    assert {c.rows for c in small} == set(ROWS)


def test_a_difference_is_seen() -> None:
    """The comparison itself: one value changed at a time, each just beyond its tolerance."""

    def outcome(**changes: object) -> Outcome:
        base = {
            "ids": [[0, 1]], "lr": [1e-4], "loss": [1.0], "grad_norm": [2.0], "metrics": [[1.0, 0.5, 0.5]],
            "tensors": {"weight:a": torch.ones(2), "frozen:b": torch.ones(2), "logits": torch.tensor([[1.0, 1.00005]])},
        }  # fmt: skip
        return Outcome(**{**base, **changes})  # type: ignore[arg-type]

    tensors = outcome().tensors
    changed = {
        "ids": outcome(ids=[[0, 2]]),
        "lr": outcome(lr=[1.0001e-4]),
        "loss": outcome(loss=[1.00002]),
        "grad_norm": outcome(grad_norm=[2.0002]),
        "logits": outcome(tensors={**tensors, "logits": torch.tensor([[0.9, 1.00005]])}),
        "predictions": outcome(tensors={**tensors, "logits": torch.tensor([[1.0, 0.99995]])}),
        "metrics": outcome(metrics=[[1.0, 0.6, 0.5]]),
        "weights": outcome(tensors={**tensors, "weight:a": torch.ones(2) + 2e-4}),
        "frozen": outcome(tensors={**tensors, "frozen:b": torch.ones(2) + 1e-7}),
    }
    assert changed.keys() == TOLERANCES.keys()
    assert beyond(compare(outcome(), outcome())) == {}
    for key, other in changed.items():
        assert list(beyond(compare(other, outcome()))) == [key], key
    for key in ("loss", "grad_norm"):
        good = {"loss": [1.0] * 3, "grad_norm": [2.0] * 3, "lr": [1e-4] * 3, "ids": [[0]] * 3}
        long, lost = outcome(**good), outcome(**{**good, key: [good[key][0], NAN, good[key][0]]})
        assert set(beyond(compare(lost, long))) == {key}
    spoilt = {"weight:a": torch.ones(2), "weight:b": torch.tensor([NAN]), "weight:c": torch.ones(2)}
    whole = {**spoilt, "weight:b": torch.ones(1)}
    both = (outcome(tensors={**tensors, **weights}) for weights in (spoilt, whole))
    assert set(beyond(compare(*both))) == {"weights"}
    assert set(beyond(compare(outcome(loss=[1.0, 1.0]), outcome()))) == set(TOLERANCES)
