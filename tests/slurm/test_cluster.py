"""Jobs on a real SLURM: two nodes, signals, requeues, arrays, and names that try to break out."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from harness import command, read_json, read_lines
from job_process import faulty_config, faulty_environment
from material import Material
from slurm_cluster import SCRIPT, Cluster, WriteConfig, losses, wait_until
from wandb_file import run_ids

pytestmark = pytest.mark.slurm

LONG = {"train": {"epochs": 16, "global_batch_size": 16, "micro_batch_size": 4, "lr": 2e-4, "precision": "fp32"}}


def log_of(run: Path, job: str) -> str:
    return (run / "logs" / f"slurm-{job}.out").read_text(encoding="utf-8")


def started(run: Path) -> bool:
    return (run / "metrics.jsonl").exists() and len(losses(run)) > 0


def afters(run: Path) -> list[str | None]:
    """Why each attempt at a run began."""
    return [start.get("after") for start in read_lines(run / "attempts.jsonl")]


def srun(config: Path, tasks_per_node: int = 1, task: str = "train") -> list[str]:
    """A command with one task for each of two processes, on two nodes or on one, and no torchrun in between."""
    return [
        "srun", "--kill-on-bad-exit=1", f"--nodes={2 // tasks_per_node}", "--ntasks=2",
        f"--ntasks-per-node={tasks_per_node}", "--cpus-per-task=1",
        sys.executable, "-m", "dist_finetune", task, str(config),
    ]  # fmt: skip


Straight = Callable[..., dict[int, float]]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Straight:
    """Losses of the same run by two processes here, never interrupted, with variables that its model needs; runs that
    differ in the name or in checkpoints are one."""
    found: dict[str, dict[int, float]] = {}

    def train(config: Path, **env: str) -> dict[int, float]:
        content = {k: v for k, v in read_json(config).items() if k not in ("name", "track", "launch", "checkpoint")}
        key = json.dumps(content, sort_keys=True)
        if key not in found:
            folder = tmp_path_factory.mktemp("straight")
            words = ("train", str(config), "name=straight", "track.wandb=off")
            done = command(*words, folder=folder, num_processes=2, timeout_s=240, **env)
            assert done.returncode == 0, done.stderr[-3000:]
            found[key] = losses(folder / "runs" / "straight")
        return found[key]

    return train


def test_two_nodes_train_as_one_machine_does(
    cluster: Cluster, config: WriteConfig, straight: Straight, tmp_path: Path
) -> None:
    path = config("pair")
    job = cluster.submit(tmp_path, str(path), "--nodes", "2", "--gpus-per-node", "0")
    cluster.wait_for(job, "COMPLETED")
    run = tmp_path / "runs" / "pair"
    summary = read_json(run / "summary.json")
    assert (summary["status"], summary["world_size"], summary["strategy"]) == ("finished", 2, "zero2")
    assert "2 nodes (n[1-2]) meet at n1:" in log_of(run, job)
    assert losses(run) == straight(path)
    submit = (sys.executable, "-m", "dist_finetune", "submit", str(path), "--dry-run")
    again = cluster.call(*submit, check=False, timeout_s=120, cwd=tmp_path)
    assert "is finished" in again


@pytest.mark.parametrize("tasks_per_node", [pytest.param(1, marks=pytest.mark.slow), 2])  # `submit` tests one a node
def test_srun_starts_the_worker_itself(
    cluster: Cluster, config: WriteConfig, straight: Straight, tmp_path: Path, tasks_per_node: int
) -> None:
    path = config(f"srun{tasks_per_node}")
    cluster.call(*srun(path, tasks_per_node), timeout_s=200, cwd=tmp_path)
    run = tmp_path / "runs" / f"srun{tasks_per_node}"
    assert read_json(run / "summary.json")["world_size"] == 2
    assert losses(run) == straight(path)


@pytest.mark.slow
def test_an_srun_step_saves_at_a_signal_and_goes_on(
    cluster: Cluster, config: WriteConfig, straight: Straight, tmp_path: Path
) -> None:
    path, run = config("told", **LONG), tmp_path / "runs" / "told"
    step = subprocess.Popen(srun(path), env=cluster.env, cwd=tmp_path, stdin=subprocess.DEVNULL)
    try:
        wait_until(lambda: started(run), "the first step")
        (step_id,) = cluster.call("squeue", "--noheader", "--steps", "--format=%i").split()
        cluster.call("scancel", "--signal=USR1", step_id)
        assert step.wait(timeout=90) != 0
    finally:
        step.terminate()  # ends what srun started, too
        step.wait(timeout=90)
    summary = read_json(run / "summary.json")
    assert summary["status"] == "stopped"
    assert f"stopped on SIGUSR1 after step {max(losses(run))} of" in summary["message"]
    cluster.call(*srun(path), timeout_s=200, cwd=tmp_path)
    assert losses(run) == straight(path)


@pytest.mark.slow
def test_the_doctor_looks_at_the_tasks_of_an_srun(cluster: Cluster, config: WriteConfig, tmp_path: Path) -> None:
    said = cluster.call(*srun(config("doctor"), task="doctor"), timeout_s=200, cwd=tmp_path)
    assert re.search(r"^ok    ranks +2 ranks by srun on 2 machines", said, re.MULTILINE), said
    assert re.search(r"^ok    rendezvous +at n1:\d+ over ", said, re.MULTILINE), said
    assert re.search(r"^ok    all-reduce +sums are right", said, re.MULTILINE), said
    assert re.search(r"^ok    run folder +\S+/runs is shared by all machines$", said, re.MULTILINE), said
    assert re.search(r"^ok    config +zero2, fp32; Accelerate and DeepSpeed see 2 processes too$", said, re.MULTILINE)


@pytest.mark.parametrize("how", ["time limit", pytest.param("scontrol requeue", marks=pytest.mark.slow)])
def test_a_job_that_is_stopped_goes_on_where_it_was(
    cluster: Cluster, config: WriteConfig, straight: Straight, tmp_path: Path, how: str
) -> None:
    path = config("again", **LONG, track={"wandb": "offline"})
    job = cluster.submit(tmp_path, str(path), "--nodes", "2", "--gpus-per-node", "0")
    run = tmp_path / "runs" / "again"
    wait_until(lambda: started(run), "the first step")
    if how == "time limit":
        # What SLURM itself sends to the job's shell before the limit; the real limit takes minutes.
        cluster.call("scancel", "--signal=USR1", "--batch", job)
    else:
        cluster.call("scontrol", "requeue", job)
    cluster.wait_for(job, "PENDING", timeout_s=90)
    before = max(losses(run))
    assert read_json(run / "summary.json")["status"] == "stopped"
    assert (run / "checkpoints" / f"step-{before:06}" / "COMPLETE").exists(), "saved at the step it stopped at"
    cluster.wait_for(job, "COMPLETED")
    log = log_of(run, job)
    assert "attempt 2 of 4" in log
    assert ("the time limit is near" in log) == (how == "time limit")
    assert ("SIGTERM: cancelled, preempted" in log) == (how == "scontrol requeue")
    after = "the time limit" if how == "time limit" else how
    assert f"attempt 2 of 4: goes on after {after}\n" in log
    assert afters(run) == [None, after]
    assert losses(run) == straight(path), "the numbers of a run that was never stopped"
    ids = run_ids(run)
    assert set(ids) == {read_json(run / "wandb.json")["id"]}
    # SIGTERM reaches W&B's own process as well, which may leave the first file empty
    assert len(ids) == 2 or how == "scontrol requeue"


@pytest.mark.slow
def test_the_real_time_limit(
    cluster: Cluster, config: WriteConfig, material: Material, straight: Straight, tmp_path: Path
) -> None:
    """76 s of training at least, of which an attempt has at most 70; SLURM may warn a minute earlier than asked."""
    faulty = faulty_environment(material)
    content = faulty_config(material, train={"epochs": 20}, track={"wandb": "offline"})
    path = config("limit", **content, slurm={"grace": 50, "max_requeues": 9})
    slow = replace(cluster, env={**cluster.env, **faulty, "SLOW_S": "0.2"})
    job = slow.submit(tmp_path, str(path), "--nodes", "2", "--gpus-per-node", "0", "--time", "2 min")
    cluster.wait_for(job, "COMPLETED", timeout_s=900)
    run = tmp_path / "runs" / "limit"
    assert "attempt 2 of 10: goes on after the time limit\n" in log_of(run, job)
    assert {*afters(run)} - {None} == {"the time limit"}
    assert losses(run) == straight(path, **faulty)
    assert run_ids(run) == [read_json(run / "wandb.json")["id"]] * len(afters(run))


@pytest.mark.slow
def test_a_more_urgent_job_takes_the_nodes_and_gives_them_back(
    cluster: Cluster, config: WriteConfig, straight: Straight, tmp_path: Path
) -> None:
    path = config("preempted", **LONG)
    job = cluster.submit(tmp_path, str(path), "--nodes", "2", "--gpus-per-node", "0")
    run = tmp_path / "runs" / "preempted"
    wait_until(lambda: started(run), "the first step")
    urgent = cluster.call(
        "sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 3"
    ).strip()
    cluster.wait_for(urgent, "COMPLETED", timeout_s=120)
    assert read_json(run / "summary.json")["status"] == "stopped"
    cluster.wait_for(job, "COMPLETED")
    assert "goes on after PREEMPTION" in log_of(run, job)
    assert afters(run) == [None, "PREEMPTION"]
    assert losses(run) == straight(path)


def test_a_cancelled_job_saves_ends_and_leaves_nothing(cluster: Cluster, config: WriteConfig, tmp_path: Path) -> None:
    path = config("cancelled", **LONG)
    job = cluster.submit(tmp_path, str(path), "--nodes", "2", "--gpus-per-node", "0")
    run = tmp_path / "runs" / "cancelled"
    wait_until(lambda: started(run), "the first step")
    cluster.call("scancel", job)
    cluster.wait_for(job, "CANCELLED", timeout_s=60)
    wait_until(lambda: not processes_with(str(run)), "the end of every process", timeout_s=45)
    assert read_json(run / "summary.json")["status"] == "stopped"
    assert list((run / "checkpoints").glob("step-*/COMPLETE"))


def processes_with(word: str) -> list[int]:
    """Processes that have `word` on their command line."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if word.encode() in (folder / "cmdline").read_bytes() and int(folder.name) != os.getpid():
                found.append(int(folder.name))
        except OSError:
            continue  # ended meanwhile
    return found


def test_a_failing_job_ends_at_once_with_the_message(cluster: Cluster, config: WriteConfig, tmp_path: Path) -> None:
    """Submitted while its data was there; it is gone when the job starts."""
    data = tmp_path / "rows.csv"
    data.write_text("text,label\n" + "".join(f"good word {i},a\nbad word {i},b\n" for i in range(40)))
    path = config("gone", data={"train": str(data), "validation": 0.2})
    cluster.call("scontrol", "update", "PartitionName=main", "State=DOWN")
    try:
        job = cluster.submit(tmp_path, str(path), "--nodes", "2", "--gpus-per-node", "0")
        data.unlink()
    finally:
        cluster.call("scontrol", "update", "PartitionName=main", "State=UP")
    cluster.wait_for(job, "FAILED", timeout_s=120)
    log = log_of(tmp_path / "runs" / "gone", job)
    assert log.splitlines()[-1].endswith("failed, exit code 1; the message is above")
    # torchrun's report of the rank that failed first, in our words, is the last thing that says what went wrong.
    told = [line for line in log.splitlines() if "rror" in line and "srun: " not in line and "slurmstepd" not in line]
    assert str(data) in told[-1], told[-3:]
    assert "attempt 2" not in log


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_job_on_both_nodes(
    cluster: Cluster, config: WriteConfig, material: Material, tmp_path: Path
) -> None:
    """The other one hangs, so that it would not notice and hold its node."""
    path, run, died = config("dies", **faulty_config(material)), tmp_path / "runs" / "dies", tmp_path / "died"
    faults = [
        {"kind": "hang", "rank": 0, "call": 30},
        {"kind": "raise", "rank": 1, "call": 30, "marker": str(died)},
    ]
    faulty = replace(cluster, env={**cluster.env, **faulty_environment(material), "FAULT": json.dumps(faults)})
    job = faulty.submit(tmp_path, str(path), "--nodes", "2", "--gpus-per-node", "0")
    wait_until(died.exists, "the fault")
    cluster.wait_for(job, "FAILED", timeout_s=60)
    wait_until(lambda: not processes_with(str(run)), "the end of every process", timeout_s=20)
    log = log_of(run, job)
    assert "ValueError: the fault that was asked for" in log
    assert log.splitlines()[-1].endswith("failed, exit code 1; the message is above")
    assert "attempt 2" not in log


@pytest.mark.slow
def test_two_jobs_share_two_nodes(cluster: Cluster, config: WriteConfig, tmp_path: Path) -> None:
    """Their ports differ, so neither takes the other's ranks."""
    folders = [tmp_path / name for name in ("one", "two")]
    paths = [config(folder.name, folder) for folder in folders]
    jobs = [
        cluster.submit(folder, str(path), "--nodes", "2", "--gpus-per-node", "0")
        for folder, path in zip(folders, paths, strict=True)
    ]
    for job in jobs:
        cluster.wait_for(job, "COMPLETED")
    logs = [log_of(folder / "runs" / folder.name, job) for folder, job in zip(folders, jobs, strict=True)]
    ports = {log.split("meet at n1:")[1].split()[0] for log in logs}
    assert len(ports) == 2
    assert losses(folders[0] / "runs" / "one") == losses(folders[1] / "runs" / "two")


@pytest.mark.slow
def test_a_sweep_is_a_job_array(cluster: Cluster, config: WriteConfig, tmp_path: Path) -> None:
    path = config("sweep", cache="on")
    job = cluster.submit(
        tmp_path, str(path), "--gpus-per-node", "0", "--sweep", "train.lr=1e-4,3e-4", "--sweep", "freeze.layers=0"
    )
    cluster.wait_for(job, "COMPLETED")
    runs = sorted(p.parent for p in (tmp_path / "runs" / "sweep").glob("*/summary.json"))
    assert [run.name for run in runs] == ["000-lr=1e-4,layers=0", "001-lr=3e-4,layers=0"]
    assert all(read_json(run / "summary.json")["status"] == "finished" for run in runs)
    assert losses(runs[0]) != losses(runs[1])
    told = [(run / "log.txt").read_text(encoding="utf-8") for run in runs]
    assert sorted(("cache built" in text, "cache reused" in text) for text in told) == [(False, True), (True, False)]
    logs = sorted(p.name for p in (tmp_path / "runs" / "sweep" / "logs").glob("*.out"))
    assert logs == [f"slurm-{job}_0.out", f"slurm-{job}_1.out"]


@pytest.mark.parametrize(
    "name",
    [
        'it\'s "a" $(touch BROKE)`touch BROKE`;&|# ünï-中文-%j-%%',
        pytest.param("-n=9 --help", marks=pytest.mark.slow),
    ],
)
def test_names_that_try_to_break_out(cluster: Cluster, config: WriteConfig, tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    slurm = {"extra": [f"--comment={name}"]}
    path = config(name, folder, train={"max_steps": 2, "global_batch_size": 8}, slurm=slurm)
    job = cluster.submit(folder, str(path), "--gpus-per-node", "0")
    cluster.wait_for(job, "COMPLETED")
    assert read_json(folder / "runs" / name / "summary.json")["status"] == "finished"
    assert "finished" in log_of(folder / "runs" / name, job)
    assert f"Comment={name}" in cluster.call("scontrol", "show", "job", job)
    assert not list(tmp_path.rglob("BROKE*"))


@pytest.mark.slow
def test_the_script_for_submitting_by_hand(cluster: Cluster, config: WriteConfig, tmp_path: Path) -> None:
    path = config("by-hand")
    script = Path(__file__).parents[2] / "slurm" / "train_cpu.sbatch"
    job = cluster.call("sbatch", "--parsable", "--time=10", str(script), str(path), "train.max_steps=2", cwd=tmp_path)
    cluster.wait_for(job.strip(), "COMPLETED")
    assert read_json(tmp_path / "runs" / "by-hand" / "summary.json")["steps"] == 2


@pytest.mark.slow
def test_a_node_that_dies_gives_the_job_back(
    cluster: Cluster, config: WriteConfig, straight: Straight, tmp_path: Path
) -> None:
    path = config("node", **LONG, checkpoint={"every": "5 steps"})
    job = cluster.submit(tmp_path, str(path), "--nodes", "2", "--gpus-per-node", "0")
    run = tmp_path / "runs" / "node"
    wait_until(lambda: list(run.glob("checkpoints/step-*/COMPLETE")), "a checkpoint")
    cluster.call(str(SCRIPT), "lose-node", str(cluster.folder), "n2")
    try:
        cluster.wait_for(job, "PENDING", timeout_s=120)
    finally:
        cluster.call(str(SCRIPT), "return-node", str(cluster.folder), "n2")
    cluster.wait_for(job, "COMPLETED")
    assert afters(run) == [None, "NODE FAILURE"]
    assert read_lines(run / "attempts.jsonl")[1]["step"] >= 5
    assert losses(run) == straight(path)
