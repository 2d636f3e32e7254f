"""Talking to the cluster of `cluster.sh`, and reading what its jobs left."""

import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import read_lines

SCRIPT = Path(__file__).with_name("cluster.sh")
JOB_TIMEOUT_S = 240
RELEASE_AFTER_S = 6
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "DEADLINE"}

WriteConfig = Callable[..., Path]


@dataclass(frozen=True)
class Cluster:
    """Where the cluster's files are, and an environment whose programs talk to it."""

    folder: Path
    env: dict[str, str]

    def call(self, *command: str, timeout_s: float = 60, check: bool = True, cwd: Path | None = None) -> str:
        """Runs a program; its stdout."""
        done = subprocess.run(
            command,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            cwd=cwd or self.folder,
        )
        if check:
            assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
        return done.stdout if done.returncode == 0 else done.stdout + done.stderr

    def submit(self, cwd: Path, *arguments: str) -> str:
        """`dist-finetune submit` in `cwd`; the job's id."""
        said = self.call(sys.executable, "-m", "dist_finetune", "submit", *arguments, timeout_s=120, cwd=cwd)
        found = re.search(r"^submitted job (\d+)$", said, re.MULTILINE)
        assert found, said
        return found[1]

    def states(self, job: str) -> list[str]:
        """States of a job's tasks, such as RUNNING; [] once SLURM has forgotten it."""
        return re.findall(r"JobState=(\S+)", self.call("scontrol", "show", "job", job, check=False))

    def wait_for(self, job: str, *states: str, timeout_s: float = JOB_TIMEOUT_S) -> None:
        """Until all tasks are in one of `states`. A job that was queued again is let start after a few seconds.

        SLURM itself waits two minutes: at once, its nodes would still refuse the job's revoked credential.
        """
        deadline, release = time.monotonic() + timeout_s, time.monotonic() + RELEASE_AFTER_S
        while not (found := self.states(job)) or not set(found) <= set(states):
            assert time.monotonic() < deadline, f"{found} after {timeout_s} s, not {states}:\n{self._account(job)}"
            assert not set(found) & ENDED - set(states), f"{found}, not {states}:\n{self._account(job)}"
            if "PENDING" not in found or "PENDING" in states:
                release = time.monotonic() + RELEASE_AFTER_S
            elif time.monotonic() > release:
                self.call("scontrol", "update", f"JobId={job}", "StartTime=now", check=False)
            time.sleep(0.3)

    def _account(self, job: str) -> str:
        """What SLURM knows of a job, and the ends of its log and of the daemons' logs."""
        known = self.call("scontrol", "show", "job", job, check=False)
        logs = [*map(Path, re.findall(r"StdOut=(\S.*)", known)), *sorted((self.folder / "log").glob("*.log"))]
        ends = [f"== {path}\n{_last_lines(path)}" for path in logs if path.exists()]
        return "\n".join([self.call("squeue"), known, *ends])


def _last_lines(path: Path, num_lines: int = 40) -> str:
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-num_lines:])


def losses(run: Path) -> dict[int, float]:
    """Training loss by optimizer step."""
    return {row["step"]: row["train/loss"] for row in read_lines(run / "metrics.jsonl") if "train/loss" in row}


def wait_until(condition: Callable[[], Any], what: str, timeout_s: float = JOB_TIMEOUT_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s} s"
        time.sleep(0.2)
