"""Stop anywhere, go on exactly: bit for bit at the same world size, within rounding at any other and any strategy."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import REPOSITORY, STRATEGIES, Job, Run, RunJobs, read_json, read_lines, run_ranks, write_config
from material import Material
from safetensors.torch import load_file

from dist_finetune.checkpoint.layout import checkpoint_folders

pytestmark = pytest.mark.dist

WORKER = REPOSITORY / "tests" / "dist" / "resume_worker.py"
STOPS = (7, 4, 9)  # in the first epoch, twice in it, and at a later moment; an evaluation takes further checks
Resume = Callable[..., tuple[list[Run], list[dict[str, Any]]]]


@pytest.fixture(scope="session")
def resume(tmp_path_factory: pytest.TempPathFactory) -> Resume:
    """`resume(jobs, num_processes)`: what jobs of (name, config, more of the worker's keys) left, and their results."""

    def train(
        jobs: Sequence[tuple[str, dict[str, Any], dict[str, Any]]], num_processes: int, output: Path | None = None
    ) -> tuple[list[Run], list[dict[str, Any]]]:
        folder = tmp_path_factory.mktemp("resume")
        output = output or folder / "runs"
        listed = []
        for number, (name, config, more) in enumerate(jobs):
            path = write_config(folder / f"{number}.yaml", config, name=name, output=str(output))
            listed.append({"config": str(path), **more})
        (folder / "jobs.json").write_text(json.dumps(listed), encoding="utf-8")
        done = run_ranks(num_processes, WORKER, [folder / "jobs.json", folder / "results.json"], 900, folder)
        assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
        results = read_json(folder / "results.json")
        return [Run(output / name, ()) for name, _, _ in jobs], results

    return train


def rows(run: Run) -> list[dict[str, Any]]:
    """metrics.jsonl without what the clock and the memory say."""
    return [
        {key: value for key, value in row.items() if not key.startswith(("perf/", "mem/")) and key != "time"}
        for row in read_lines(run.folder / "metrics.jsonl")
    ]


def check_identical(straight: Run, stopped: Run, num_attempts: int) -> None:
    """Every metric at every step, once and in order, the weights and the predictions, bit for bit."""
    assert stopped.summary["attempts"] == num_attempts
    assert rows(stopped) == rows(straight)
    a, b = straight.weights(), stopped.weights()
    assert list(a) == list(b)
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert torch.equal(straight.predictions()["logits"], stopped.predictions()["logits"])
    assert stopped.summary["num_frozen_tensors_verified"] == straight.summary["num_frozen_tensors_verified"]


def with_dropout(material: Material, strategy: str, **changes: Any) -> dict[str, Any]:
    """A BERT with dropout 0.4, several parameter groups, small evaluation batches, and a checkpoint every 3 steps."""
    train = {"lr": 1e-3, "layer_decay": 0.9, "head_lr": 2e-3, "eval_batch_size": 4, "log_every": 2, "epochs": 2}
    base = {"model": {"name": str(material.bert)}, "shard": {"strategy": strategy}, "checkpoint": {"every": "3 steps"}}
    return material.text(**{**base, "train": train, **changes})


def test_every_strategy_goes_on_bit_for_bit(material: Material, resume: Resume) -> None:
    """Stopped three times, also within an evaluation and while a checkpoint is being written; tagged words twice, in
    the middle of an epoch of three steps and within an evaluation."""
    configs = {strategy: (with_dropout(material, strategy), STOPS) for strategy in STRATEGIES}
    configs["tags"] = {**with_dropout(material, "zero2"), "data": material.task("tags")["data"]}, (5, 4)
    jobs = []
    for name, (config, stops) in configs.items():
        jobs += [(f"straight-{name}", config, {}), (f"stopped-{name}", config, {"stops": stops})]
    runs, results = resume(jobs, 2)
    all_stops = [stops for _, stops in configs.values()]
    for straight, stopped, result, stops in zip(runs[::2], runs[1::2], results[1::2], all_stops, strict=True):
        assert len(result["stops"]) == len(stops), result
        check_identical(straight, stopped, len(stops) + 1)


@pytest.mark.slow
def test_four_processes_go_on_bit_for_bit(material: Material, resume: Resume) -> None:
    """From three ranks on the order of a sum counts: DDP must not lay out its buckets anew after a resume."""
    jobs = []
    for strategy in ("ddp", "zero2"):
        config = with_dropout(material, strategy)
        jobs += [(f"straight-{strategy}", config, {}), (f"stopped-{strategy}", config, {"stops": STOPS})]
    runs, _ = resume(jobs, 4)
    for straight, stopped in zip(runs[::2], runs[1::2], strict=True):
        check_identical(straight, stopped, len(STOPS) + 1)


def test_stopped_within_an_evaluation(material: Material, resume: Resume) -> None:
    """Each check of the second epoch's evaluation in turn; the evaluation is done again, and counted once."""
    config = with_dropout(material, "ddp", checkpoint={"every": "1 epoch", "best": "eval/loss"})
    runs, _ = resume([("straight", config, {})], 1)
    # 10 batches of an evaluation before training, 10 steps, then 10 batches of the first epoch's evaluation
    jobs = [(f"stopped-{after}", config, {"stops": [after]}) for after in (4, 20, 23, 29)]
    stopped, results = resume(jobs, 1)
    assert "after step 0 of 20" in results[0]["stops"][0]
    assert all("after step 10 of 20" in result["stops"][0] for result in results[1:])
    for run in stopped:
        check_identical(runs[0], run, 2)


def test_augmented_images_and_moving_statistics(material: Material, resume: Resume) -> None:
    """Random crops, and BatchNorm statistics that move with training, on each rank with its own batches."""
    freeze = {"embeddings": True, "layers": "0", "patterns": []}
    jobs = []
    for strategy in ("ddp", "zero2"):
        train = {"epochs": 3, "eval_batch_size": 4}
        config = material.image(
            data={"augment": True},
            freeze=freeze,
            train=train,
            shard={"strategy": strategy},
            checkpoint={"every": "2 steps"},
        )
        jobs += [(f"straight-{strategy}", config, {}), (f"stopped-{strategy}", config, {"stops": [5, 6]})]
    runs, results = resume(jobs, 2)
    for straight, stopped, result in zip(runs[::2], runs[1::2], results[1::2], strict=True):
        assert len(result["stops"]) == 2
        assert any("running_mean" in name for name in straight.weights())
        check_identical(straight, stopped, 3)


def test_phases_go_on_where_they_were(material: Material, resume: Resume) -> None:
    """Stopped in the first phase, in the second, and right after a phase that ended early on a plateau."""
    phases = [
        {"name": "head", "freeze": "backbone", "epochs": 3, "until": "plateau", "head_lr": 1e-12},
        {"name": "top", "freeze": {"embeddings": True, "layers": "0-1"}, "epochs": 1, "lr": 1e-3},
        {"name": "more", "freeze": {"embeddings": True, "layers": "0"}, "epochs": 1, "lr": 1e-4},
    ]
    jobs = []
    for strategy in ("ddp", "zero2"):
        config = with_dropout(material, strategy, phases=phases, checkpoint={"every": "1 epoch"})
        del config["freeze"]
        jobs += [(f"straight-{strategy}", config, {}), (f"stopped-{strategy}", config, {"stops": [8, 25, 12]})]
    runs, results = resume(jobs, 2)
    for straight, stopped, result in zip(runs[::2], runs[1::2], results[1::2], strict=True):
        assert len(result["stops"]) == 3
        assert [phase["name"] for phase in stopped.summary["phases"]] == ["head", "top", "more"]
        assert straight.summary["stopped_early"]
        check_identical(straight, stopped, 4)


@pytest.mark.slow
def test_fifty_resumes_in_a_row(material: Material, resume: Resume) -> None:
    config = with_dropout(material, "zero1", train={"epochs": 20, "lr": 1e-3, "eval_batch_size": 64})
    jobs = [("straight", config, {}), ("stopped", config, {"stops": [3] * 50})]
    (straight, stopped), results = resume(jobs, 2)
    assert len(results[1]["stops"]) == 50
    check_identical(straight, stopped, 51)


@pytest.fixture(scope="session")
def half_way(material: Material, resume: Resume) -> dict[str, Run]:
    """A run that was never stopped, and one stopped in its first epoch under each of three strategies."""
    jobs = [("straight", several_groups(material, "ddp"), {})]
    stop = {"stops": [14], "only_stops": True}
    jobs += [(strategy, several_groups(material, strategy), stop) for strategy in ("ddp", "zero2", "zero3")]
    runs, results = resume(jobs, 2)
    assert all("after step" in result["stops"][0] for result in results[1:])
    return dict(zip(["straight", "ddp", "zero2", "zero3"], runs, strict=True))


def several_groups(material: Material, strategy: str) -> dict[str, Any]:
    """A BERT without dropout, with parameter groups of four rates and two weight decays."""
    train = {"lr": 2e-4, "layer_decay": 0.9, "head_lr": 4e-4, "epochs": 3, "log_every": 1}
    return material.text(train=train, checkpoint={"every": "4 steps"}, shard={"strategy": strategy})


@pytest.mark.parametrize(
    "num_processes", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
)
def test_other_world_sizes_and_strategies(
    half_way: dict[str, Run], material: Material, resume: Resume, num_processes: int, tmp_path: Path
) -> None:
    """Each saved run goes on under each strategy: the next 20 losses within 1e-5, the same samples and rates."""
    jobs = []
    for saved in ("ddp", "zero2", "zero3"):
        for strategy in STRATEGIES:
            name = f"{saved}-to-{strategy}"
            shutil.copytree(half_way[saved].folder, tmp_path / name)
            jobs.append((name, several_groups(material, strategy), {"changes": "layout"}))
    runs, results = resume(jobs, num_processes, output=tmp_path)
    straight = half_way["straight"]
    assert len(runs) == 3 * len(STRATEGIES)
    for run, result in zip(runs, results, strict=True):
        assert "error" not in result, result
        assert (run.summary["world_size"], run.summary["attempts"]) == (num_processes, 2)
        for key in ("train/lr", "progress/samples"):
            assert run.series(key) == straight.series(key), run.folder.name
        losses, expected = run.series("train/loss")[8:28], straight.series("train/loss")[8:28]
        assert len(expected) == 20
        assert max(abs(a - b) / b for a, b in zip(losses, expected, strict=True)) < 1e-5, run.folder.name


def test_a_checkpoint_holds_what_trains_and_nothing_frozen(half_way: dict[str, Run]) -> None:
    """12 bytes a trainable element, whatever saved it, within 2 %, and not one frozen name."""
    for strategy in ("ddp", "zero2", "zero3"):
        folder = sorted((half_way[strategy].folder / "checkpoints").glob("step-*"))[-1]
        tensors = [tensor for file in sorted(folder.glob("*.safetensors")) for tensor in load_file(file).items()]
        phase = next(iter(read_json(half_way[strategy].folder / "freeze.json")["phases"].values()))
        trainable = {
            t["name"]: t["num_elements"] for t in phase["tensors"] if t["kind"] == "parameter" and not t["frozen"]
        }
        held = {key.partition(":")[2].rpartition("@")[0] for key, _ in tensors}
        assert held == set(trainable)
        assert sum(tensor.numel() for _, tensor in tensors) == 3 * sum(trainable.values())
        assert {file.suffix for file in folder.iterdir()} == {".safetensors", ".json", ""}


def test_a_checkpoint_is_as_large_as_planned_and_pauses_less_than_a_step(material: Material, runs: RunJobs) -> None:
    """MiniLM with its embeddings and 4 of 6 blocks frozen: three saves of 41 MiB, written while training goes on."""
    config = material.text(
        model={"name": "demo:minilm"},
        freeze={"embeddings": True, "layers": "0-3"},
        train={"max_steps": 6, "epochs": 1, "global_batch_size": 32},
        checkpoint={"every": "2 steps", "keep": 3},
        cache="off",
    )
    run = runs([Job("minilm", config)], 2)["minilm"]
    planned = read_json(run.folder / "plan.json")["costs"]["checkpoint_bytes"]
    for folder in checkpoint_folders(run.folder):
        assert sum(path.stat().st_size for path in folder.iterdir()) == pytest.approx(planned, rel=0.02)
    step_s = max(row["perf/step_s"] for row in read_lines(run.folder / "metrics.jsonl") if "perf/step_s" in row)
    assert run.summary["save_pause_s"] < step_s
