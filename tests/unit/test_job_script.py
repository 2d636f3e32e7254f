"""What the job script does when it is told to stop, with stand-ins for SLURM's programs; tests/slurm has the real."""

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from dist_finetune.launchers.slurm import SlurmJob, render_job
from dist_finetune.spec_launch import SlurmSpec

SRUN = """#!/bin/bash
trap 'told=1' USR1 TERM
[ -z "${RUNNING+x}" ] || echo running > "$DIST_FINETUNE_VERDICT"
echo "${DIST_FINETUNE_AFTER-}" > "$STUBS/after"
echo $$ > "$STUBS/srun.started"
for ((i = 0; i < ${TENTHS:-100} && !told; i++)); do sleep 0.1; done
[ -z "${VERDICT+x}" ] || echo "$VERDICT" > "$DIST_FINETUNE_VERDICT"
exit 1
"""
SCONTROL = """#!/bin/bash
if [ "$1" = requeue ]; then echo "$2" >> "$STUBS/requeued"; else echo n1; fi
"""


def stubs(folder: Path, **programs: str) -> Path:
    """Programs for the PATH, which write down in `folder` what they were given."""
    folder.mkdir()
    for name, text in programs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


def wait_for_file(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def job(folder: Path, num_runs: int = 1, grace_s: int = 60) -> SlurmJob:
    runs = [folder / f"run{i}" for i in range(num_runs)]
    for run in runs:
        run.mkdir(exist_ok=True)
    configs = tuple(run / "config.yaml" for run in runs)
    return SlurmJob("x", SlurmSpec(max_requeues=2), 1, 0, 1, grace_s, configs=configs, folder=folder)


def environment(programs: Path, **more: str) -> dict[str, str]:
    """What SLURM gives a job script, with `programs` in place of its own."""
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_NUM_NODES": "1", "STUBS": str(programs)}
    return {"PATH": f"{programs}:{os.environ['PATH']}", **slurm, **more}


def ended(
    folder: Path, script: SlurmJob, number: signal.Signals, log: Path | None = None, **env: str
) -> tuple[int, str]:
    """Exit code and output of a job script that gets a signal while its workers run; what it says is added to `log`."""
    log = log or folder / "log"
    programs = folder / "bin" if (folder / "bin").exists() else stubs(folder / "bin", srun=SRUN, scontrol=SCONTROL)
    (programs / "srun.started").unlink(missing_ok=True)
    with log.open("a") as out:
        process = subprocess.Popen(
            ["bash", "-c", render_job(script)],
            env=environment(programs, **env),
            cwd=folder,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_for_file(programs / "srun.started")
        process.send_signal(number)
        process.wait(timeout=30)
    finally:
        process.kill()
        process.wait()
    return process.returncode, log.read_text()


def run_through(folder: Path, script: SlurmJob, **env: str) -> tuple[int, str]:
    """Exit code and output of a job script that nobody disturbs."""
    done = subprocess.run(
        ["bash", "-c", render_job(script)],
        env=environment(folder / "bin", **env),
        cwd=folder,
        text=True,
        capture_output=True,
        timeout=30,
    )
    assert done.stderr == ""
    return done.returncode, done.stdout


def requeued(folder: Path) -> list[str]:
    path = folder / "bin" / "requeued"
    return path.read_text().split() if path.exists() else []


@pytest.mark.parametrize(
    ("array", "named"), [({}, "7"), ({"SLURM_ARRAY_JOB_ID": "6", "SLURM_ARRAY_TASK_ID": "1"}, "6_1")]
)
def test_a_task_of_an_array_is_queued_again_alone(tmp_path: Path, array: dict[str, str], named: str) -> None:
    """Its own id may be that of the whole array, whose other tasks would be stopped and queued again with it."""
    script = job(tmp_path, num_runs=2 if array else 1)
    _, out = ended(tmp_path, script, signal.SIGUSR1, **array)
    assert requeued(tmp_path) == [named]
    assert f"job {named}, attempt 1 of 3: stopped at the time limit" in out


def test_a_save_that_takes_too_long_is_queued_again_by_the_same_name(tmp_path: Path) -> None:
    stubs(tmp_path / "bin", srun=SRUN.replace("told=1", "true").replace(":-100", ":-25"), scontrol=SCONTROL)
    array = {"SLURM_ARRAY_JOB_ID": "6", "SLURM_ARRAY_TASK_ID": "1"}
    _, _ = ended(tmp_path, replace(job(tmp_path, num_runs=2), grace_s=16), signal.SIGUSR1, **array)
    assert requeued(tmp_path)[0] == "6_1"


@pytest.mark.parametrize(
    ("left", "code", "again"),
    [
        ({"RUNNING": "", "VERDICT": "stopped"}, 75, True),
        ({"RUNNING": "", "VERDICT": "failed"}, 1, False),
        ({"RUNNING": "", "VERDICT": ""}, 1, False),
        ({"RUNNING": ""}, 1, False),
        ({}, 75, True),
    ],
    ids=["saved", "failed", "no room for the word", "killed", "not begun"],
)
def test_only_a_run_that_saved_is_queued_again(tmp_path: Path, left: dict[str, str], code: int, again: bool) -> None:
    """srun and torchrun end with 1 in each case; one that had not begun has nothing to save."""
    given, out = ended(tmp_path, job(tmp_path), signal.SIGUSR1, **left)
    assert given == code, out
    assert requeued(tmp_path) == (["7"] if again else [])
    assert ("failed, exit code 1; the message is above" in out) != again
    left_behind = [path.read_text() for path in (tmp_path / "run0").iterdir()]
    assert left_behind == (["the time limit\n"] if again else []), "only what the next attempt reads"


def test_a_job_is_queued_again_as_often_as_allowed(tmp_path: Path) -> None:
    """Two requeues make three attempts; a fourth, as after one preemption too many, ends before it takes the nodes."""
    saved = {"RUNNING": "", "VERDICT": "stopped"}
    code, out = ended(tmp_path, job(tmp_path), signal.SIGUSR1, SLURM_RESTART_COUNT="2", **saved)
    assert (code, requeued(tmp_path)) == (75, []), out
    assert "attempt 3 of 3: stopped by time limit; submit it again" in out
    (tmp_path / "bin" / "srun.started").unlink()
    code, out = run_through(tmp_path, job(tmp_path), SLURM_RESTART_COUNT="3")
    assert code == 1
    assert "attempt 4 of 3: was queued again as often as launch.slurm.max_requeues allows; submit it again" in out
    assert requeued(tmp_path) == []
    assert not (tmp_path / "bin" / "srun.started").exists()


def test_each_task_meets_at_a_port_of_its_own_where_nobody_answers(tmp_path: Path) -> None:
    """To the last task of an array SLURM gives the array's own id; the port that follows from it is taken here."""
    srun = '#!/bin/sh\nprintf "%s\\n" "$@" > "$STUBS/srun.arguments"\n'
    programs = stubs(tmp_path / "bin", srun=srun, scontrol="#!/bin/sh\necho 127.0.0.1\n")
    array, found = {"SLURM_ARRAY_JOB_ID": "2111"}, []
    with socket.create_server(("127.0.0.1", 26_888)):
        for task, job_id in (("0", "2112"), ("1", "2111")):
            own = {"SLURM_ARRAY_TASK_ID": task, "SLURM_JOB_ID": job_id}
            code, out = run_through(tmp_path, job(tmp_path, num_runs=2), **array, **own)
            assert code == 0, out
            given = (programs / "srun.arguments").read_text().splitlines()
            found += [word for word in given if word.startswith(("--master-", f"{tmp_path}/run"))]
    address = "--master-addr=127.0.0.1"
    assert found[:3] == [address, "--master-port=26896", str(tmp_path / "run0" / "config.yaml")]
    assert found[3:] == [address, "--master-port=26889", str(tmp_path / "run1" / "config.yaml")]


@pytest.mark.parametrize(
    ("line", "after"),
    [
        ("", "the time limit"),
        ("DUE TO PREEMPTION ***", "PREEMPTION"),
        ("DUE TO JOB REQUEUE ***", "scontrol requeue"),
        ("DUE TO NODE FAILURE, SEE SLURMCTLD LOG FOR DETAILS ***", "NODE FAILURE"),
        ("***", "a reason that SLURM did not write here"),
    ],
)
def test_an_attempt_knows_why_the_one_before_ended(tmp_path: Path, line: str, after: str) -> None:
    """SLURM's own words for it stand in the job's log, to which every attempt adds."""
    script, log = job(tmp_path), tmp_path / "log"
    saved = {"RUNNING": "", "VERDICT": "stopped", "TENTHS": "8"}  # SLURM itself tells srun of a SIGTERM
    ended(tmp_path, script, signal.SIGUSR1 if not line else signal.SIGTERM, log=log, **saved)
    with log.open("a") as file:
        file.write(f"slurmstepd-n1: error: *** JOB 7 ON n1 CANCELLED AT 2026-11-27T18:47:59 {line}\n")
    ended(tmp_path, script, signal.SIGUSR1, log=log, SLURM_RESTART_COUNT="1", **saved)
    assert f"attempt 2 of 3: goes on after {after}\n" in log.read_text()
    assert (tmp_path / "bin" / "after").read_text() == f"{after}\n"


TORCHRUN = """#!/bin/bash
trap 'told=1' USR1 TERM
echo > "$STUBS/torchrun.started"
while [ -z "$told" ]; do sleep 0.1; done
sleep 1
exit 1
"""


@contextlib.contextmanager
def another_node(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The second node's shell, whose torchrun runs until it is told to stop, and a second more."""
    programs = stubs(folder / "bin", python=TORCHRUN)
    node = render_job(job(folder)).split("\nnode='")[1].split("'\n")[0]
    process = subprocess.Popen(
        ["bash", "-c", node, str(programs / "python")],
        env={"PATH": os.environ["PATH"], "SLURM_NODEID": "1", "STUBS": str(programs)},
        start_new_session=True,
    )
    try:
        wait_for_file(programs / "torchrun.started")
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.parametrize(
    ("told", "stays"),
    [([signal.SIGUSR1], True), ([signal.SIGTERM], True), ([signal.SIGUSR1, signal.SIGTERM], False)],
)
def test_another_node_outlasts_the_first_one_and_no_more(
    tmp_path: Path, told: list[signal.Signals], stays: bool
) -> None:
    """SLURM's end of a step tells it that the first node is gone, here while its own torchrun still ends."""
    with another_node(tmp_path) as process:
        for number in told:
            os.killpg(process.pid, number)
            time.sleep(0.3)
        if stays:
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(timeout=3)
        else:
            assert process.wait(timeout=8) == 1


def test_a_waiting_node_whose_sleep_is_not_told_ends_too(tmp_path: Path) -> None:
    """SLURM signals the processes that it has listed, and a `sleep` that has just begun is not among them."""
    with another_node(tmp_path) as process:
        os.killpg(process.pid, signal.SIGUSR1)
        time.sleep(2.5)
        assert process.poll() is None
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(timeout=8) == 1
