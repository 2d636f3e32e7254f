"""A few of the faults of benchmarks/faults.py, which does them by the hundred; a disk that is full in mid-run."""

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from harness import REPOSITORY, Run, read_json, read_lines, run_ranks, write_config
from job_process import faulty_config, faulty_environment, run_command, started, train_to_the_end, wait_for_step
from material import Material

from dist_finetune.checkpoint.layout import checkpoint_folders
from dist_finetune.checkpoint.read import damage

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def faults() -> ModuleType:
    """benchmarks/faults.py, which is no package."""
    spec = importlib.util.spec_from_file_location("faults", REPOSITORY / "benchmarks" / "faults.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["faults"] = module
    spec.loader.exec_module(module)
    return module


def test_a_disturbed_run_ends_as_an_undisturbed_one(faults: ModuleType, tmp_path: Path) -> None:
    tally = faults.suite(2, tmp_path, seed=3, num_epochs=3, strategies=("zero2",))
    assert sum(tally.done[name] for name in faults.FAULTS) == 2
    assert tally.problems == [], faults.table(tally)
    assert tally.done["run to its end under zero2"] == tally.runs


def test_the_suite_sees_what_is_wrong(faults: ModuleType, tmp_path: Path) -> None:
    """A folder that is half a checkpoint, a damaged one, and a wrong exit code."""
    folder = tmp_path / "checkpoints" / "step-000003"
    folder.mkdir(parents=True)
    problems = faults._look_at(tmp_path, set(), 1, "signal to the launcher")
    assert problems == [
        "step-000003 bears a checkpoint's name and is not complete",
        "exit code 1 after a signal",
    ]
    (folder / "COMPLETE").write_text("{}")
    assert faults._look_at(tmp_path, set(), 137, "kill -9 of one rank") == [
        "step-000003: COMPLETE is not what was written"
    ]
    assert faults.compare(Run(tmp_path, ()), Run(tmp_path, ())) == [f"{tmp_path.name} did not finish"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system in memory that takes 70 files; skips where this user can't mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200m,nr_inodes=70", "tmpfs", str(folder)]
    made = subprocess.run(mount, capture_output=True, text=True, check=False, timeout=30)
    if made.returncode != 0:
        pytest.skip(f"needs root to mount a tmpfs: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True, timeout=30)


def test_a_disk_that_fills_up_costs_no_checkpoint(material: Material, small_disk: Path, tmp_path: Path) -> None:
    """Training goes on with a warning; the job ends with 1, as its last state is not saved; with room it goes on."""
    changes: dict[str, Any] = {"checkpoint": {"every": "1 steps", "keep": 1000}, "cache": "off", "train": {"epochs": 4}}
    config = write_config(
        tmp_path / "job.yaml", faulty_config(material, **changes), name="job", output=str(small_disk / "runs")
    )
    run = small_disk / "runs" / "job"
    with started(run_command(config), tmp_path, material) as job:
        assert job.wait(90) == 1, job.output()[-3000:]
        assert "WARNING checkpoint not saved: " in job.output()
        assert "No space left on device" in job.output()
        assert "error: checkpoint not saved: " in job.output()
    saved = checkpoint_folders(run)
    assert 3 < len(saved) < 25
    assert [damage(folder) for folder in saved] == [None] * len(saved)
    subprocess.run(["mount", "-o", "remount,size=200m,nr_inodes=2000", str(small_disk)], check=True, timeout=30)
    train_to_the_end(config, tmp_path, material)
    straight = write_config(
        tmp_path / "straight.yaml", faulty_config(material, **changes), name="straight", output=str(tmp_path / "runs")
    )
    train_to_the_end(straight, tmp_path, material)
    a, b = Run(run, ()), Run(tmp_path / "runs" / "straight", ())
    assert read_json(run / "summary.json")["attempts"] == 2
    assert all(torch.equal(a.weights()[name], tensor) for name, tensor in b.weights().items())
    assert a.series("train/loss") == b.series("train/loss")


def test_a_second_job_on_the_folder_of_a_first_is_refused(material: Material, tmp_path: Path) -> None:
    """It waits a second here, else more than a minute. The first one notices nothing."""
    changes: dict[str, Any] = {"train": {"epochs": 400}, "checkpoint": {"every": "1000 steps"}}
    config = write_config(
        tmp_path / "job.yaml", faulty_config(material, **changes), name="job", output=str(tmp_path / "runs")
    )
    run, second = tmp_path / "runs" / "job", tmp_path / "second.py"
    second.write_text(
        f"import os, sys; os.environ.update({faulty_environment(material)!r})\n"
        f"sys.path += {faulty_environment(material)['PYTHONPATH'].split(':')!r}\n"
        "from dist_finetune.cli import main\n"
        "from dist_finetune.hold import Hold\n"
        "Hold.take.__defaults__ = (1.0,)\n"
        "main()\n"
    )
    with started(run_command(config), tmp_path, material) as job:
        wait_for_step(job, run, 3)
        for words in (["train", config], ["train", config, "--fresh"]):
            done = run_ranks(2, second, words, 90, tmp_path)
            assert done.returncode == 2, done.stderr[-3000:]
            assert f"is being written by another job, process {job.rank_pid(0)} on " in done.stderr
        step = read_lines(run / "metrics.jsonl")[-1]["step"]
        wait_for_step(job, run, step + 2)
        job.process.terminate()
        assert job.wait(60) == 75, job.output()[-3000:]
    steps = [row["step"] for row in read_lines(run / "metrics.jsonl") if "train/loss" in row]
    assert steps == list(range(1, len(steps) + 1))
    assert [start["attempt"] for start in read_lines(run / "attempts.jsonl")] == [1]
    assert not list(run.glob(".writer*"))
