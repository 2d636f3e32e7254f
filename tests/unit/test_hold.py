"""One job at a time writes a run's folder, whatever became of the one before."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from dist_finetune import hold as hold_module
from dist_finetune import turns
from dist_finetune.errors import TrainingError, UserError
from dist_finetune.hold import Hold
from dist_finetune.run_folder import enter_run_folder, start_run_folder
from dist_finetune.spec import Spec
from dist_finetune.spec_file import load_spec
from dist_finetune.stopping import Stopped, refuse_if_told

HOLDER = """
import pathlib, sys, time
from dist_finetune.hold import Hold
assert Hold(pathlib.Path(sys.argv[1])).take()
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def spec(tmp_path: Path) -> Spec:
    return load_spec(
        {"model": {"name": "demo:minilm"}, "data": {"train": "x.csv"}, "name": "job", "output": str(tmp_path)}
    )


@contextmanager
def other_job(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds `folder`."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def test_a_second_job_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    said: list[str] = []
    with other_job(tmp_path) as first:
        with pytest.raises(UserError) as refused:
            Hold(tmp_path, said.append).take(patience_s=0.2)
        holder = f"process {first.pid} on {os.uname().nodename}"
        assert f"is being written by another job, {holder}. Wait for its end" in str(refused.value)
        assert f"touch {tmp_path}/STOP" in str(refused.value)
        assert said == [f"{tmp_path} is held by {holder}: waiting up to 0 s for its end"]
        first.kill()
        first.wait()
        with Hold(tmp_path) as second:
            assert second.take(patience_s=0.0), "free at once where its process is known to be gone"
            assert not second.take(), "ours already"
    assert hidden(tmp_path) == []


def test_a_job_of_another_machine_is_judged_by_its_touches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a lost node, or where a job is queued again and gets another one."""
    monkeypatch.setattr(turns, "STALE_S", 0.5)
    file = tmp_path / ".writer.turn-0"
    file.write_text(json.dumps({"host": "node9 boot pid", "pid": 1, "started": "1"}))

    def touch(_: str) -> None:
        os.utime(file, ns=(time.time_ns(), time.time_ns()))

    monkeypatch.setattr(hold_module, "LOOK_EVERY_S", 0.1)
    alive = Hold(tmp_path, touch)
    sleep = time.sleep
    with monkeypatch.context() as patched:
        patched.setattr(hold_module.time, "sleep", lambda s: (touch(""), sleep(s)))
        with pytest.raises(UserError, match="process 1 on node9"):
            alive.take(patience_s=1.5)
    with Hold(tmp_path) as hold:
        assert hold.take(patience_s=1.5)
    assert hidden(tmp_path) == []


def test_who_waits_for_another_job_can_be_told_to_stop(tmp_path: Path) -> None:
    file = tmp_path / ".writer.turn-0"
    file.write_text(json.dumps({"host": "node9 boot pid", "pid": 1, "started": "1"}))
    signals = SimpleNamespace(first=None)
    told: list[str] = []

    def say(line: str) -> None:
        told.append(line)
        signals.first = signal.SIGTERM

    started = time.monotonic()
    with pytest.raises(Stopped, match="stopped on SIGTERM before the first step"):
        Hold(tmp_path, say, partial(refuse_if_told, signals)).take()  # type: ignore[arg-type]
    assert time.monotonic() - started < 20
    assert len(told) == 1


def test_a_job_that_lost_its_hold_says_so_and_leaves_the_others_alone(tmp_path: Path) -> None:
    first = Hold(tmp_path)
    first.take()
    first.require()
    (tmp_path / ".writer.turn-1").write_text(json.dumps({"host": "node9 boot pid", "pid": 7, "started": "1"}))
    with pytest.raises(TrainingError, match=r"another job, process 7 on node9, has gone on with the run"):
        first.require()
    first.release()
    assert ".writer.turn-1" in hidden(tmp_path)


def test_a_run_that_goes_on_is_held_from_its_first_look(spec: Spec, tmp_path: Path) -> None:
    run = tmp_path / "job"
    with Hold(run) as hold:
        assert enter_run_folder(spec, False, "none", hold) == "new"
        assert not run.exists(), "nothing is made before all input is known to be right"
        start_run_folder(spec, False, 0, True, hold)
        assert hidden(run) == [".writer.turn-0"]
    with Hold(run) as hold:
        assert enter_run_folder(spec, False, "none", hold) == "unfinished"
        assert hidden(run) == [".writer.turn-0"]
    (run / "summary.json").write_text('{"status": "finished"}')
    with Hold(run) as hold:
        assert enter_run_folder(spec, False, "none", hold) == "finished"
        assert hidden(run) == [], "which is not written, and may lie where nobody can write"


def test_fresh_holds_both_folders_while_it_moves_the_old_one(spec: Spec, tmp_path: Path) -> None:
    run = tmp_path / "job"
    with Hold(run) as hold:
        start_run_folder(spec, False, 0, True, hold)
    with Hold(run) as hold:
        assert enter_run_folder(spec, True, "none", hold) == "new"
        assert hidden(run) == [".writer.turn-0"]
        start_run_folder(spec, True, 0, True, hold)
        (aside,) = tmp_path.glob("job.2*")
        assert hidden(aside) == []
        assert hidden(run) == [".writer.turn-0"]


def test_a_run_that_another_job_began_meanwhile_is_not_begun_again(spec: Spec, tmp_path: Path) -> None:
    with Hold(tmp_path / "job") as mine, Hold(tmp_path / "job") as other:
        assert enter_run_folder(spec, False, "none", mine) == "new"
        start_run_folder(spec, False, 0, True, other)
        other.release()
        with pytest.raises(UserError, match="another job has begun this run since; start again"):
            start_run_folder(spec, False, 0, True, mine)


def test_a_sandbox_that_hides_the_machine_goes_by_touches_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Process numbers of two of them mean nothing to each other: the first holds as long as it touches its file."""
    monkeypatch.setattr(turns, "BOOT_ID", tmp_path / "hidden")
    with Hold(tmp_path) as hold:
        assert hold.take()
        monkeypatch.setattr(turns, "_NOWHERE", "another sandbox")
        with pytest.raises(UserError, match="is being written by another job"):
            Hold(tmp_path).take(patience_s=0.1)
        hold.require()
    assert Hold(tmp_path).take()
