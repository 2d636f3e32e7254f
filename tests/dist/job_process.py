"""A training started from the command line, watched, signalled, and looked for afterwards: nothing may be left."""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from harness import REPOSITORY, clean_environment, command, free_port, read_json, read_lines, torchrun, write_config
from material import Material

TOKEN = "FAULT_TEST_TOKEN"
PROGRAMS = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
"""A PATH on which `deepspeed` finds its own programs."""
needs_mpirun = pytest.mark.skipif(shutil.which("mpirun") is None, reason="no mpirun here: apt-get install openmpi-bin")
HANDLED = {"PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGUSR1"}


def faulty_config(material: Material, **changes: Any) -> dict[str, Any]:
    """A config of `faulty_model`: 10 optimizer steps an epoch, a checkpoint every 5."""
    base = {
        "model": {"name": "faulty_model:build", "weights": "none", "dropout": None},
        "checkpoint": {"every": "5 steps"},
    }
    train = {"epochs": 4, "lr": 1e-3, "log_every": 1, **changes.pop("train", {})}
    freeze = {"embeddings": False, "layers": None, "patterns": ["words.*"]}
    return material.text(**{**base, "freeze": freeze, "train": train, **changes})


def faulty_environment(material: Material) -> dict[str, str]:
    """Variables with which a process finds `faulty_model` and its tokenizer."""
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests" / "dist")])
    return {"PYTHONPATH": path, "FAULTY_TOKENIZER": str(material.bert)}


class JobProcess:
    """A launcher's process, and through a token in their environment everything it started."""

    def __init__(self, command: Sequence[str], folder: Path, material: Material, **env: str) -> None:
        self.folder, self._token = folder, secrets.token_hex(8)
        self._out = (folder / "out.txt").open("ab")
        more = {**faulty_environment(material), TOKEN: self._token, "PYTHONFAULTHANDLER": "1", **env}
        self.process = subprocess.Popen(
            command, cwd=folder, env=clean_environment(**more),
            stdout=self._out, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def output(self) -> str:
        """What it printed, all ranks that have the terminal together."""
        return (self.folder / "out.txt").read_text(encoding="utf-8", errors="replace")

    def wait(self, timeout_s: float = 60) -> int:
        """The exit code. Fails where the process or anything it started is still there in the end."""
        try:
            code = self.process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            for pid in self.pids():
                os.kill(pid, signal.SIGABRT)  # which has each process say where it is
            time.sleep(2)
            raise AssertionError(f"still running after {timeout_s} s:\n{self.output()[-12000:]}") from None
        wait_for(lambda: not self.pids(), 10, lambda: f"processes are left: {self.pids()}")
        return code

    def pids(self) -> list[int]:
        """Processes of this job, its launcher included, that have not ended."""
        wanted = f"{TOKEN}={self._token}".encode()
        return [
            pid
            for pid in map(int, filter(str.isdigit, (path.name for path in Path("/proc").iterdir())))
            if wanted in _environment(pid)
        ]

    def rank_pid(self, rank: int) -> int:
        """The process of a rank."""
        found = [pid for pid in self.pids() if f"RANK={rank}".encode() in _environment(pid)]
        return min(found)

    def end(self) -> None:
        """Kills what is left of it, by process id."""
        for pid in self.pids():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait(timeout=10)
        self._out.close()


def _environment(pid: int) -> list[bytes]:
    try:
        if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return []
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []


def hears_of_signals(pid: int) -> bool:
    """True where a process holds SIGTERM back, or has a handler for it: it is past the start of Python itself."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    masks = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    return any(int(masks[name], 16) >> (signal.SIGTERM - 1) & 1 for name in ("SigBlk", "SigCgt"))


@contextmanager
def started(command: Sequence[str], folder: Path, material: Material, **env: str) -> Iterator[JobProcess]:
    """A running job that is gone when the block is left."""
    job = JobProcess(command, folder, material, **env)
    try:
        yield job
    finally:
        job.end()


def train_to_the_end(config: Path, folder: Path, material: Material, *words: str) -> None:
    """Trains a config of `faulty_config` on 2 processes, where starting them is not what a test is about."""
    faulty = faulty_environment(material)
    done = command("train", config, *words, folder=folder, num_processes=2, timeout_s=120, **faulty)
    assert done.returncode == 0, done.stderr[-3000:]


def wait_for(condition: Callable[[], object], timeout_s: float, what: Callable[[], str]) -> None:
    """Waits until `condition` holds; fails with `what` after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.02)


def run_command(config: Path, num_processes: int = 2) -> list[str]:
    return [sys.executable, "-m", "dist_finetune", "run", str(config), "--processes", str(num_processes)]


def torchrun_command(config: Path, num_processes: int = 2, *options: str) -> list[str]:
    return [*torchrun(num_processes), *options, "-m", "dist_finetune", "train", str(config)]


def accelerate_command(config: Path, num_processes: int = 2) -> list[str]:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", f"--num_processes={num_processes}"]
    return [*launch, "--main_process_port=0", "-m", "dist_finetune", "train", str(config)]


def deepspeed_command(config: Path, num_processes: int = 2) -> list[str]:
    launch = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", str(num_processes)]
    return [*launch, "--master_port", str(free_port()), "--module", "dist_finetune", "train", str(config)]


def mpirun_command(config: Path, num_processes: int = 2, meeting: bool = True) -> list[str]:
    root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    at = ["-x", "MASTER_ADDR=127.0.0.1", "-x", f"MASTER_PORT={free_port()}"] if meeting else []
    launch = ["mpirun", *root, "--oversubscribe", "-np", str(num_processes), *at]
    return [*launch, sys.executable, "-m", "dist_finetune", "train", str(config)]


def last_step(run: Path) -> int:
    """The newest optimizer step in metrics.jsonl; -1 before the first."""
    path = run / "metrics.jsonl"
    try:
        return max((row["step"] for row in read_lines(path) if "train/loss" in row), default=-1)
    except (FileNotFoundError, ValueError):
        return -1


def wait_for_step(job: JobProcess, run: Path, step: int, timeout_s: float = 90) -> None:
    """Waits until the run has logged `step`."""
    wait_for(
        lambda: last_step(run) >= step or job.process.poll() is not None, timeout_s, lambda: f"no step:\n{job.output()}"
    )
    assert last_step(run) >= step, job.output()[-3000:]


__all__ = [
    "HANDLED", "PROGRAMS", "JobProcess", "accelerate_command", "deepspeed_command", "faulty_config",
    "faulty_environment", "hears_of_signals", "last_step", "mpirun_command", "needs_mpirun", "read_json", "run_command",
    "started", "torchrun_command", "train_to_the_end", "wait_for", "wait_for_step", "write_config",
]  # fmt: skip
