"""Runs of the real program over several processes, each with a deadline, none left behind."""

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from material import Material
from safetensors.torch import load_file

REPOSITORY = Path(__file__).parents[2]
COMMAND = Path(__file__).with_name("command.py")
WORKER = Path(__file__).with_name("worker.py")
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp")
MATRIX = ((1, "ddp"), (1, "zero2"), *((2, strategy) for strategy in STRATEGIES))
"""Numbers of processes, and strategies, of the runs that many tests look at."""
_one_launch = threading.Lock()


@dataclass(frozen=True)
class Job:
    """One run for the worker: a config as a dict, and overrides that only some ranks get."""

    name: str
    config: dict[str, Any]
    by_rank: dict[str, list[str]] | None = None


@dataclass(frozen=True)
class Run:
    """What a run left behind, and what each rank returned."""

    folder: Path
    by_rank: tuple[dict[str, Any], ...]

    @property
    def summary(self) -> dict[str, Any]:
        return read_json(self.folder / "summary.json")

    def series(self, key: str) -> list[float]:
        """Values of a metric by step, each step once."""
        found = {row["step"]: row[key] for row in read_lines(self.folder / "metrics.jsonl") if key in row}
        return [found[step] for step in sorted(found)]

    def predictions(self, split: str = "validation") -> dict[str, torch.Tensor]:
        return load_file(self.folder / "predictions" / f"{split}.safetensors")

    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "model" / "model.safetensors")


RunJobs = Callable[..., dict[str, Run]]


@dataclass(frozen=True)
class Matrix:
    """The same job at 1 and 2 processes and every strategy; keys such as "1-ddp" and "2-zero3"."""

    text: dict[str, Run]
    image: dict[str, Run]

    @property
    def all(self) -> dict[str, Run]:
        return {f"text-{k}": v for k, v in self.text.items()} | {f"image-{k}": v for k, v in self.image.items()}


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def stored_features(store: Path, split: str, depth: str) -> tuple[np.ndarray, np.ndarray]:
    """Features and labels in dataset order, read without the program."""
    shards = [load_file(path) for path in sorted((store / split).glob("0*"))]
    order = torch.cat([s["ids"] for s in shards]).argsort()
    return torch.cat([s[depth] for s in shards])[order].numpy(), torch.cat([s["labels"] for s in shards])[order].numpy()


def clean_environment(**more: str) -> dict[str, str]:
    """The environment of a process that a launcher starts: one thread, no network, no launcher's variables."""
    launchers = ("SLURM_", "OMPI_", "PMI_", "ACCELERATE_", "PET_", "TORCHELASTIC_", "WANDB_")
    names = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK"}
    kept = {k: v for k, v in os.environ.items() if not k.startswith(launchers) and k not in names}
    path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH", ""))))
    fixed = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": path}
    return {**kept, **fixed, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", **more}


def finish(command: Sequence[str], timeout_s: float, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs a command in a process group of its own; after `timeout_s` the whole group is killed and the test fails."""
    process = subprocess.Popen(
        command, cwd=cwd, env=clean_environment(**env), text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate(timeout=30)
        pytest.fail(f"{' '.join(command)} took more than {timeout_s} s\n{out[-3000:]}\n{err[-3000:]}")
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@functools.cache
def _forking() -> subprocess.Popen[str]:
    """The process of `forked.py` that this test session starts its ranks from; it ends with the session."""
    command = [sys.executable, str(REPOSITORY / "tests" / "dist" / "forked.py")]
    process = subprocess.Popen(
        command, env=clean_environment(), text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    _next_line(process, "ready")
    return process


def _next_line(process: subprocess.Popen[str], wanted: str) -> str:
    assert process.stdout is not None
    for line in process.stdout:  # packages may greet while they are imported
        if line.strip() == wanted or (wanted == "a number" and line.strip().isdigit()):
            return line.strip()
    raise AssertionError(f"forked.py ended with {process.wait(30)}; run it by hand to see why")


@dataclass(frozen=True)
class Ranks:
    """Ranks of one job that `start_ranks` has started."""

    script: Path
    folder: Path
    group: int

    def end(self, timeout_s: float) -> subprocess.CompletedProcess[str]:
        """Waits for all of them; after `timeout_s` they are killed and the test fails."""
        end_s = time.monotonic() + timeout_s
        while self.are_running and time.monotonic() < end_s:
            time.sleep(0.02)
        out, err = ((self.folder / f"ranks.{name}").read_text("utf-8", "replace") for name in ("out", "err"))
        if not (self.folder / "ranks.status").exists():
            self.signal(signal.SIGKILL)
            pytest.fail(f"{self.script.name} took more than {timeout_s} s, or was killed\n{out[-3000:]}\n{err[-3000:]}")
        status = int((self.folder / "ranks.status").read_text(encoding="utf-8"))
        return subprocess.CompletedProcess([str(self.script)], status, out, err)

    @property
    def are_running(self) -> bool:
        return Path(f"/proc/{self.group}").exists()

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to each of them, and to the process that waits for them."""
        with suppress(ProcessLookupError):
            os.killpg(self.group, number)


def start_ranks(num_processes: int, script: Path, arguments: Sequence[object], folder: Path, **env: str) -> Ranks:
    """Starts a script as the ranks of one job, as torchrun does, with the imports paid already (forked.py).

    `folder` is theirs alone while they run.
    """
    with _one_launch, socket.socket() as free:
        free.bind(("localhost", 0))
        launch = {
            "script": str(script), "arguments": [str(word) for word in arguments], "num_processes": num_processes,
            "port": free.getsockname()[1], "folder": str(folder), "env": env,
        }  # fmt: skip
        process = _forking()
        assert process.stdin is not None
        (folder / "ranks.status").unlink(missing_ok=True)
        free.close()
        print(json.dumps(launch), file=process.stdin, flush=True)
        return Ranks(script, folder, int(_next_line(process, "a number")))


def run_ranks(
    num_processes: int, script: Path, arguments: Sequence[object], timeout_s: float, folder: Path, **env: str
) -> subprocess.CompletedProcess[str]:
    """`start_ranks`, and waits for their end: what `finish([*torchrun(...), ...])` does."""
    return start_ranks(num_processes, script, arguments, folder, **env).end(timeout_s)


def start_apart(
    rank: int, world_size: int, port: int, code: str, folder: Path, arguments: Sequence[object] = (), **env: str
) -> Ranks:
    """Starts one rank of a job whose ranks, as far as they can tell, are each alone on their machine and were started
    by hand. `folder` is this rank's alone."""
    folder.mkdir(exist_ok=True)
    (folder / "code.py").write_text(code, encoding="utf-8")
    names = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": port}
    by_hand = {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "", **{k: str(v) for k, v in names.items()}}
    return start_ranks(1, folder / "code.py", arguments, folder, **by_hand, **env)


def command(
    *words: object, folder: Path, num_processes: int = 1, timeout_s: float = 200, **env: str
) -> subprocess.CompletedProcess[str]:
    """Runs `dist-finetune WORDS` in `folder` as the ranks of one job, with the imports paid already."""
    return run_ranks(num_processes, COMMAND, words, timeout_s, folder, **env)


def free_port() -> int:
    """A port of this machine at which nobody listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def torchrun(num_processes: int) -> list[str]:
    return [
        sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={num_processes}", "--master-port=0",
        "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0",
    ]  # fmt: skip


def write_config(path: Path, config: dict[str, Any], **top: Any) -> Path:
    """A config file of `config` with more top-level keys."""
    path.write_text(yaml.safe_dump({**config, **top}), encoding="utf-8")
    return path


def ten_steps(material: Material, folder: Path, name: str) -> Path:
    """The config file of a run of ten steps at ZeRO-2."""
    config = material.text(shard={"strategy": "zero2"}, train={"epochs": 1})
    return write_config(folder / f"{name}.yaml", config, output=str(folder / "runs"))


def train_jobs(
    jobs: Sequence[Job], num_processes: int, folder: Path, timeout_s: float = 600, worker: Path = WORKER, **env: str
) -> dict[str, Run]:
    """Trains the jobs one after the other in one process group; what each left, by its name.

    `env` are variables of theirs. With one that names a device they are started by torchrun.
    """
    listed = []
    for job in jobs:
        config = write_config(folder / f"{job.name}.yaml", job.config, name=job.name, output=str(folder / "runs"))
        listed.append({"name": job.name, "config": str(config), "by_rank": job.by_rank or {}})
    (folder / "jobs.json").write_text(json.dumps(listed))
    arguments = [str(folder / "jobs.json"), str(folder / "results.json")]
    if "DS_ACCELERATOR" in env:
        done = finish([*torchrun(num_processes), str(worker), *arguments], timeout_s, folder, **env)
    else:
        done = run_ranks(num_processes, worker, arguments, timeout_s, folder, **env)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    results = [read_json(folder / f"results.json.{rank}") for rank in range(num_processes)]
    return {job.name: Run(folder / "runs" / job.name, tuple(r[job.name] for r in results)) for job in jobs}
