"""Told to stop, a job saves once and ends with 75, whoever started it and however it was told; nothing is left."""

import json
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import Job, RunJobs, command, read_json
from job_process import (
    HANDLED,
    PROGRAMS,
    JobProcess,
    accelerate_command,
    deepspeed_command,
    faulty_config,
    faulty_environment,
    hears_of_signals,
    mpirun_command,
    needs_mpirun,
    run_command,
    started,
    torchrun_command,
    train_to_the_end,
    wait_for,
    wait_for_step,
    write_config,
)
from material import Material
from wandb_file import records

from dist_finetune.checkpoint.layout import checkpoint_folders
from dist_finetune.checkpoint.read import damage

pytestmark = pytest.mark.dist

LONG = {"train": {"epochs": 400}, "checkpoint": {"every": "1000 steps"}}


@pytest.fixture
def make_config(material: Material, tmp_path: Path) -> Callable[..., Path]:
    """`make_config(**changes)`: the file of a config whose run is `tmp_path`/runs/job."""

    def make(**changes: Any) -> Path:
        config = faulty_config(material, **changes)
        return write_config(tmp_path / "job.yaml", config, name="job", output=str(tmp_path / "runs"))

    return make


def check_stopped(
    job: JobProcess | None, run: Path, code: int, reason: str, expected_code: int = 75, num_checkpoints: int = 1
) -> int:
    """Only good checkpoints, the newest of the step where the job says it stopped; returns the step."""
    assert code == expected_code, job and job.output()[-3000:]
    summary = read_json(run / "summary.json")
    assert summary["status"] == "stopped"
    assert f"stopped on {reason} after step" in summary["message"]
    folders = checkpoint_folders(run)
    assert [damage(folder) for folder in folders] == [None] * num_checkpoints
    step = read_json(folders[0] / "state.json")["progress"]["step"]
    assert f"after step {step} of" in summary["message"]
    assert {path.name for path in (run / "checkpoints").iterdir()} == {folder.name for folder in folders}
    return step


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGINT, signal.SIGUSR1))]
)
def test_run_stops_on_a_signal_and_goes_on(
    make_config: Callable[..., Path], material: Material, tmp_path: Path, number: signal.Signals
) -> None:
    config, run = make_config(**LONG), tmp_path / "runs" / "job"
    with started(run_command(config), tmp_path, material) as job:
        wait_for_step(job, run, 3)
        job.process.send_signal(number)
        step = check_stopped(job, run, job.wait(30), number.name)
    with started(run_command(config), tmp_path, material) as job:
        wait_for_step(job, run, step + 2)
        assert f"going on from step-{step:06d}" in job.output()
        (run / "STOP").touch()
        check_stopped(job, run, job.wait(30), "the file STOP", num_checkpoints=2)


@pytest.mark.parametrize(
    ("launch", "number"),
    [
        pytest.param(torchrun_command, signal.SIGUSR1, marks=pytest.mark.slow),  # a SLURM job's own way to stop
        pytest.param(accelerate_command, signal.SIGUSR1, marks=pytest.mark.slow),
        pytest.param(torchrun_command, signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(accelerate_command, signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_other_launchers_pass_signals_on(
    make_config: Callable[..., Path],
    material: Material,
    tmp_path: Path,
    launch: Callable[[Path], list[str]],
    number: signal.Signals,
) -> None:
    """They turn each code into 1, so the summary says it; torchrun's own report ends with our words. Both signal the
    loader processes of a rank too."""
    config, run = make_config(data={"num_workers": 1}, **LONG), tmp_path / "runs" / "job"
    with started(launch(config), tmp_path, material, **HANDLED) as job:
        wait_for_step(job, run, 3)
        job.process.send_signal(number)
        code = job.wait(45)
        assert code != 0
        check_stopped(job, run, code, number.name, expected_code=code)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launch", "number", "reason"),
    [
        pytest.param(mpirun_command, signal.SIGUSR1, "SIGUSR1", marks=needs_mpirun),
        (deepspeed_command, signal.SIGUSR1, "SIGTERM"),
    ],
)
def test_all_ranks_wait_while_the_first_one_closes_its_tracker(
    make_config: Callable[..., Path],
    material: Material,
    tmp_path: Path,
    launch: Callable[[Path], list[str]],
    number: signal.Signals,
    reason: str,
) -> None:
    """mpirun passes SIGUSR1 on, `deepspeed` dies of it; both end all processes as soon as one of them has ended."""
    config, run = make_config(**LONG, track={"wandb": "offline"}), tmp_path / "runs" / "job"
    with started(launch(config), tmp_path, material, PATH=PROGRAMS, SLOW_CLOSE_S="6") as job:
        wait_for_step(job, run, 3)
        job.process.send_signal(number)
        assert job.process.wait(timeout=40) != 0
        wait_for(lambda: not job.pids(), 40, lambda: f"processes are left: {job.pids()}\n{job.output()[-3000:]}")
        check_stopped(job, run, 0, reason, expected_code=0)
    (path,) = run.rglob("*.wandb")
    assert [record.exit.exit_code for record in records(path) if record.HasField("exit")] == [1]


def test_torchrun_that_is_killed_takes_its_workers_along(
    make_config: Callable[..., Path], material: Material, tmp_path: Path
) -> None:
    """They would go on alone and hold their GPUs; so they save and end."""
    config, run = make_config(**LONG), tmp_path / "runs" / "job"
    with started(torchrun_command(config), tmp_path, material) as job:
        wait_for_step(job, run, 3)
        job.process.kill()
        job.wait(5)  # also waits until no worker is left
        check_stopped(job, run, 0, "SIGTERM", expected_code=0)


@pytest.mark.slow
def test_deepspeed_that_is_ended_takes_its_workers_along(
    make_config: Callable[..., Path], material: Material, tmp_path: Path
) -> None:
    """It passes no signal on, and its workers' parent is a process in between, which would keep them."""
    config, run = make_config(**LONG), tmp_path / "runs" / "job"
    with started(deepspeed_command(config), tmp_path, material, PATH=PROGRAMS) as job:
        wait_for_step(job, run, 3)
        job.process.terminate()
        assert job.process.wait(timeout=20) != 0
        wait_for(lambda: not job.pids(), 40, lambda: f"processes are left: {job.pids()}\n{job.output()[-3000:]}")
        check_stopped(job, run, 0, "SIGTERM", expected_code=0)


def test_a_time_limit_stops_too(make_config: Callable[..., Path], material: Material, tmp_path: Path) -> None:
    """And resume takes another one; a file STOP that is still there is the last stop's."""
    longer = {"train": {"epochs": 4000}, "checkpoint": {"every": "100000 steps"}, "launch": {"time_limit": "4 s"}}
    config, run = make_config(**longer), tmp_path / "runs" / "job"
    first = command("train", config, folder=tmp_path, num_processes=2, **faulty_environment(material))
    step = check_stopped(None, run, first.returncode, "launch.time_limit")
    (run / "STOP").touch()
    refused = command("train", config, "launch.time_limit=1 s", folder=tmp_path, **faulty_environment(material))
    assert refused.returncode == 2, "time_limit is part of the config, and resume is what takes another one"
    assert "dist-finetune resume" in refused.stderr
    resume = ("train", config, "launch.time_limit=6 s", "--changes", "layout")  # as `resume` starts its workers
    resumed = command(*resume, folder=tmp_path, num_processes=2, **faulty_environment(material))
    assert check_stopped(None, run, resumed.returncode, "launch.time_limit", num_checkpoints=2) > step
    assert not (run / "STOP").exists()


def test_a_signal_before_the_first_step_is_not_lost(
    make_config: Callable[..., Path], material: Material, tmp_path: Path
) -> None:
    """While torch is imported, data are read and the model loads: the run ends with 75 before it begins."""
    config, run = make_config(**LONG), tmp_path / "runs" / "job"
    with started(run_command(config), tmp_path, material) as job:
        wait_for(lambda: len(job.pids()) == 3 and all(map(hears_of_signals, job.pids())), 30, job.output)
        assert not run.exists(), "too late to test this"
        job.process.send_signal(signal.SIGTERM)
        assert job.wait(60) == 75
        assert "stopped on SIGTERM before the first step" in job.output()
    assert not run.exists()


def test_a_second_signal_ends_at_once(make_config: Callable[..., Path], material: Material, tmp_path: Path) -> None:
    """Also while a rank hangs and the others wait for it in a collective; the last checkpoint stays as it was."""
    config, run = make_config(checkpoint={"every": "5 steps"}, train={"epochs": 400}), tmp_path / "runs" / "job"
    fault = json.dumps({"kind": "hang", "rank": 1, "call": 30})
    with started(run_command(config), tmp_path, material, FAULT=fault) as job:
        wait_for_step(job, run, 12)
        time.sleep(1.0)
        job.process.send_signal(signal.SIGTERM)
        time.sleep(2.5)
        assert job.process.poll() is None
        job.process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        assert job.wait(20) == 128 + signal.SIGTERM
        assert time.monotonic() - began < 8
    folders = checkpoint_folders(run)
    assert folders
    assert damage(folders[0]) is None


@pytest.mark.parametrize("launch", [run_command, pytest.param(torchrun_command, marks=pytest.mark.slow)])
def test_a_failed_rank_ends_all_with_its_own_words_last(
    make_config: Callable[..., Path], material: Material, tmp_path: Path, launch: Callable[[Path], list[str]]
) -> None:
    config = make_config(train={"epochs": 400})
    fault = json.dumps({"kind": "raise", "rank": 1, "call": 30})
    with started(launch(config), tmp_path, material, FAULT=fault) as job:
        assert job.wait(60) == 1
        tail = "\n".join(job.output().splitlines()[-25:])
        assert "ValueError: the fault that was asked for" in tail, tail
        assert "Connection closed by peer" not in tail[tail.index("the fault that was asked for") :]


def test_a_rank_without_memory_says_what_to_do(
    make_config: Callable[..., Path], material: Material, tmp_path: Path
) -> None:
    """And what it names works: fewer rows at once go on from the last checkpoint."""
    config, run = make_config(), tmp_path / "runs" / "job"
    fault = json.dumps({"kind": "memory", "rank": 1, "call": 30, "marker": str(tmp_path / "done")})
    with started(run_command(config), tmp_path, material, FAULT=fault) as job:
        assert job.wait(60) == 1
        said = job.output().splitlines()[-1]
    assert said.startswith(f"error: rank 1 on {socket.gethostname()}: the machine has no memory left: "), said
    assert "DefaultCPUAllocator: can't allocate memory: you tried to allocate" in said
    assert "Use a smaller train.micro_batch_size" in said
    assert said.endswith(f"dist-finetune resume {run} train.micro_batch_size=1"), said
    summary = read_json(run / "summary.json")
    assert (summary["status"], summary["message"]) == ("failed", f"TrainingError: {said.removeprefix('error: ')}")
    resume = [sys.executable, "-m", "dist_finetune", *said.split("dist-finetune ")[-1].split(), "--processes", "2"]
    with started(resume, tmp_path, material) as job:
        assert job.wait(60) == 0, job.output()[-3000:]
    assert read_json(run / "summary.json")["attempts"] == 2


@pytest.mark.parametrize("victim", [*(pytest.param(f"rank {r}", marks=pytest.mark.slow) for r in (0, 1)), "launcher"])
def test_a_killed_process_ends_all(
    make_config: Callable[..., Path], material: Material, tmp_path: Path, victim: str
) -> None:
    """kill -9, as the system does when memory runs out: the job is gone within 30 s, and says which rank it was."""
    config, run = make_config(train={"epochs": 400}), tmp_path / "runs" / "job"
    with started(run_command(config), tmp_path, material) as job:
        wait_for(lambda: checkpoint_folders(run), 60, job.output)
        os.kill(job.process.pid if victim == "launcher" else job.rank_pid(int(victim[-1])), signal.SIGKILL)
        code = job.wait(30)
        if victim == "launcher":
            assert code == -signal.SIGKILL
        else:
            assert code == 128 + signal.SIGKILL
            assert f"error: {victim} of 2 was ended by SIGKILL" in job.output().splitlines()[-1]
    assert damage(checkpoint_folders(run)[0]) is None


def test_a_failed_job_is_started_again(make_config: Callable[..., Path], material: Material, tmp_path: Path) -> None:
    """launch.max_restarts: from the last checkpoint, and the result is that of a run that never failed."""
    config, run = make_config(launch={"max_restarts": 2}), tmp_path / "runs" / "job"
    fault = json.dumps({"kind": "kill", "rank": 1, "call": 30, "marker": str(tmp_path / "done")})
    with started([*run_command(config), "--fresh"], tmp_path, material, FAULT=fault) as job:
        assert job.wait(90) == 0, job.output()[-3000:]
        assert "restart 1 of 2" in job.output()
    summary = read_json(run / "summary.json")
    assert (summary["status"], summary["attempts"]) == ("finished", 2)
    again = command("train", config, folder=tmp_path, num_processes=2)
    assert again.returncode == 0
    assert "is finished" in again.stdout, "a launcher that starts it again trains nothing twice"


HANGING = {"train": {"epochs": 400}, "launch": {"timeout": "10 s", "file_timeout": "20 s"}}


def test_a_rank_that_hangs_is_named(make_config: Callable[..., Path], material: Material, tmp_path: Path) -> None:
    """In its own code, where it is behind while others wait for it."""
    config, run = make_config(**HANGING), tmp_path / "runs" / "job"
    fault = json.dumps({"kind": "hang", "rank": 1, "call": 30})
    done = command("train", config, folder=tmp_path, num_processes=2, FAULT=fault, **faulty_environment(material))
    assert done.returncode == 1
    last = done.stderr[done.stderr.rindex("error: ") :]
    assert "rank 1 on" in last.splitlines()[0]
    assert "hangs" in last.splitlines()[0]
    assert re.search(r"rank 1: \w+\.py line \d+, .*model\(.*, inside faulty_model\.py line \d+", last)
    assert read_json(run / "summary.json")["status"] == "failed"


@pytest.mark.slow
def test_a_rank_that_is_stopped_as_a_whole_is_named(
    make_config: Callable[..., Path], material: Material, tmp_path: Path
) -> None:
    config, run = make_config(**HANGING), tmp_path / "runs" / "job"
    with started(run_command(config), tmp_path, material) as job:
        wait_for_step(job, run, 40)
        os.kill(job.rank_pid(1), signal.SIGSTOP)
        assert job.wait(60) == 1
        last = job.output()[job.output().rindex("error: ") :]
        assert "rank 1 on" in last.splitlines()[0]
        assert "no longer answers" in last.splitlines()[0]


def test_a_loss_that_is_not_a_number_stops_and_keeps_what_was_before(
    make_config: Callable[..., Path], material: Material, tmp_path: Path
) -> None:
    config = make_config(checkpoint={"every": "1 steps", "keep": 3}, train={"log_every": 10, "epochs": 4})
    fault = json.dumps({"kind": "nan", "rank": 1, "call": 30})
    run = tmp_path / "runs" / "job"
    done = command("train", config, folder=tmp_path, num_processes=2, FAULT=fault, **faulty_environment(material))
    assert done.returncode == 1
    assert "dist-finetune resume" in done.stderr
    found = re.search(r"step (\d+): train/loss is nan", done.stderr)
    assert found, done.stderr[-3000:]
    kept = [f"step-{int(found[1]) - back:06d}" for back in (1, 2, 3)]
    assert [folder.name for folder in checkpoint_folders(run)] == kept
    assert read_json(run / "summary.json")["status"] == "failed"
    train_to_the_end(config, tmp_path, material)


def test_a_cache_that_is_half_filled_is_kept_and_filled_up(
    make_config: Callable[..., Path], material: Material, tmp_path: Path
) -> None:
    """A signal while the frozen prefix runs ends the job at once; the next one goes on, and stores the same bytes."""
    train = {"epochs": 1, "eval_batch_size": 4}
    config = make_config(cache={"mode": "on", "folder": str(tmp_path / "cache")}, train=train)
    with started(run_command(config), tmp_path, material, SLOW_EVAL_S="0.2") as job:
        wait_for(lambda: list(tmp_path.glob("cache/.*/train-*.bin")), 60, job.output)
        time.sleep(1)
        job.process.send_signal(signal.SIGTERM)
        assert job.wait(30) == 75
        assert "stopped on SIGTERM before the first step" in job.output()
    noted = [read_json(path)["rows"] for path in tmp_path.glob("cache/.*/train-*.json")]
    assert len(noted) == 2
    assert all(0 < rows < 75 for rows in noted)
    # a number of a late row that is done: what is computed again would be written over it
    (marked,) = tmp_path.glob("cache/.*/train-00000.bin")
    numbers = np.memmap(marked, np.float32, "r+")
    place = int(np.flatnonzero(numbers)[-1])
    right, numbers[place] = numbers[place], 0.125
    numbers.flush()
    train_to_the_end(config, tmp_path, material)
    (kept,) = (tmp_path / "cache").iterdir()
    numbers = np.memmap(kept / marked.name, np.float32, "r+")
    assert numbers[place] == 0.125 != right
    numbers[place] = right
    numbers.flush()
    straight = make_config(cache={"mode": "on", "folder": str(tmp_path / "straight")}, train=train)
    train_to_the_end(straight, tmp_path, material, "--fresh")
    (whole,) = (tmp_path / "straight").iterdir()
    assert kept.name == whole.name
    for path in sorted(whole.glob("*.bin")):
        assert path.read_bytes() == (kept / path.name).read_bytes(), path.name


def test_a_bounded_number_of_such_steps_can_be_left_out(material: Material, runs: RunJobs) -> None:
    """The first pass of the fault's rank is in every run; weights and moments stay finite, and the count is told."""
    fault = json.dumps({"kind": "nan", "rank": 1, "call": 7})
    small = {"epochs": 2, "max_skipped": 1}
    jobs = [
        Job(strategy, faulty_config(material, train=small, shard={"strategy": strategy}))
        for strategy in ("ddp", "zero2", "zero3", "fsdp")
    ]
    done = runs(jobs, 2, FAULT=fault, FAULTY_TOKENIZER=str(material.bert))
    for strategy, run in done.items():
        assert run.summary["skipped"] == 1, strategy
        assert run.summary["steps"] == 20
        assert len(run.series("train/loss")) == 19
        assert run.series("train/skipped") == [1]
        assert all(weight.isfinite().all() for weight in run.weights().values())
        assert run.series("train/loss") == pytest.approx(done["ddp"].series("train/loss"), rel=1e-5)
