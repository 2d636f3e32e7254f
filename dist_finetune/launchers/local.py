"""Worker processes on this machine: started, watched, stopped together, and their own exit code given back.

torch's elastic launcher turns every failure into exit code 1 and costs a torch import before the first worker starts.
A run on one machine needs neither its rendezvous nor its restarts, so these are plain child processes.
"""

import contextlib
import ctypes
import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

from dist_finetune.errors import UserError
from dist_finetune.launchers.environment import OWN_LAUNCHER
from dist_finetune.launchers.rank_output import RankLog, Warnings, copy_in_background, open_channel

Worker = subprocess.Popen[bytes]

FORWARDED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
EXIT_STOPPED = 75
POLL_S = 0.05
# After a failure the other ranks wait in a collective and have nothing to save.
FAILURE_GRACE_S = 5.0
# Ranks that failed for the same reason end at nearly the same time; the one that has words is the one to show.
SETTLE_S = 0.5
TAIL_LINES = 20
PR_SET_PDEATHSIG = 1
ERROR_LINE = re.compile(r"^error: ", re.MULTILINE)


def count_gpus(env: Mapping[str, str] = os.environ) -> int:
    """Number of CUDA devices that workers will see.

    Importing torch to count them would cost seconds before the first worker starts, so nvidia-smi is asked, and torch
    only where there is a driver without nvidia-smi.
    """
    visible = env.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):  # the usual way to hide every device
        return 0
    present = _present_gpus()
    if visible is None:
        return present
    # CUDA ignores all entries from the first invalid one on.
    valid = itertools.takewhile(lambda device: _names_gpu(device.strip(), present), visible.split(","))
    return min(len(list(valid)), present)


def _names_gpu(device: str, present: int) -> bool:
    """Whether it is a UUID, such as GPU-..., or a number that there is."""
    return device[:1].isalpha() or (device.isdecimal() and int(device) < present)


def _present_gpus() -> int:
    program = shutil.which("nvidia-smi")
    if program:
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            listed = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=30, check=False)
            if listed.returncode == 0:
                return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
    if not Path("/dev/nvidiactl").exists():
        return 0
    import torch

    return torch.cuda.device_count()


def num_workers(gpus: int | None, processes: int | None, available: int) -> int:
    """How many processes to start: one for each visible GPU, or without any the number asked for (default 1).

    Raises UserError for more processes than GPUs, for GPUs that aren't there, and for numbers below 1.
    """
    for flag, number in (("--gpus", gpus), ("--processes", processes)):
        if number is not None and number < 1:
            raise UserError(f"{flag} {number}: at least one is needed")
    if gpus is not None and processes is not None and gpus != processes:
        raise UserError(
            f"--gpus {gpus} and --processes {processes} disagree: each process has one GPU. Give one of them."
        )
    asked = gpus if gpus is not None else processes
    if gpus is not None and available == 0:
        raise UserError(f"--gpus {gpus}: no GPU is visible here. Use --processes {gpus} to train on the CPU.")
    if available and asked is not None and asked > available:
        flag = "--gpus" if gpus is not None else "--processes"
        raise UserError(
            f"{flag} {asked} is more than the {available} visible GPU{'s' if available > 1 else ''}, and each process "
            f"needs one. Use {flag} {available}, or CUDA_VISIBLE_DEVICES= (empty) to train on the CPU."
        )
    return asked or available or 1


def launch_local(
    worker: Sequence[str],
    world_size: int,
    log_folder: Path,
    log_folder_ready: Callable[[], bool] = lambda: True,
    env: Mapping[str, str] = os.environ,
    max_restarts: int = 0,
) -> int:
    """Runs the command `worker` in `world_size` processes and returns the exit code of the whole job.

    Where a rank fails, all are started again, up to `max_restarts` times, and go on from the last checkpoint; not after
    a signal or for wrong input, which a second start would not mend.
    """
    command, code = list(worker), 0
    # A torchrun around us holds no store for these ranks.
    env = {name: value for name, value in env.items() if not name.startswith("TORCHELASTIC_")}
    for restart in range(max_restarts + 1):
        told_to_stop, code = _launch_once(command, world_size, log_folder, log_folder_ready, env)
        if told_to_stop or code in (0, EXIT_STOPPED, UserError.exit_code) or restart == max_restarts:
            break
        if log_folder_ready():
            command = [word for word in command if word != "--fresh"]  # the old folder was kept aside the first time
        print(f"restart {restart + 1} of {max_restarts}: all processes, from the last checkpoint", file=sys.stderr)
    return code


def _launch_once(
    worker: Sequence[str],
    world_size: int,
    log_folder: Path,
    log_folder_ready: Callable[[], bool],
    env: Mapping[str, str],
) -> tuple[bool, int]:
    """Whether a signal came, and the exit code of the whole job.

    That is 0 where all ranks end well, 75 where they stopped on a signal, else the code of the rank that failed first
    (128 + N where signal N ended it). Rank 0 has the terminal; of the others warnings that rank 0 does not give are
    shown, and the message that ended the job, once and last. Every rank's output goes to `log_folder`/rank-N.txt, from
    when `log_folder_ready` says so. Signals are handed on to all ranks.
    """
    logs = [RankLog() for _ in range(world_size)]
    warnings = Warnings(logs)
    workers: list[Worker] = []
    readers: list[tuple[int, int | None, RankLog]] = []
    with _forward_signals(workers, world_size) as (received, early), _reserved_port() as port:
        try:
            for rank, log in enumerate(logs):
                rank_env = {**env, **_rank_variables(rank, world_size, port)}
                workers.append(_start(worker, rank_env, rank, log, readers))
            for number in early:
                _send(workers, number)
            # Only now, as a process with threads should not fork.
            copying = [copy_in_background(*reader) for reader in readers]
            failed = _wait(workers, logs, warnings, log_folder, log_folder_ready)
        finally:
            _stop(workers)
    for thread in copying:
        # A helper process that outlives its worker may hold the pipe open.
        thread.join(timeout=2)
    _show_warnings(warnings.new_lines(older_than_s=0))
    if log_folder_ready():
        _place(logs, log_folder)
    if failed is None:
        return bool(received), EXIT_STOPPED if any(w.returncode == EXIT_STOPPED for w in workers) else 0
    _show_message(failed, workers[failed].returncode, logs, log_folder)
    code = workers[failed].returncode
    return bool(received), code if code > 0 else 128 - code


def _rank_variables(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        OWN_LAUNCHER: "run",
        "PYTHONUNBUFFERED": "1",
    }


@contextlib.contextmanager
def _reserved_port() -> Iterator[int]:
    """A free port that stays ours: bound, so that no connection of another process gets it while workers import torch,
    but not listening, so that rank 0 can."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield int(holder.getsockname()[1])


def _start(
    command: Sequence[str],
    env: Mapping[str, str],
    rank: int,
    log: RankLog,
    readers: list[tuple[int, int | None, RankLog]],
) -> Worker:
    """One worker in a process group of its own, so that Ctrl-C reaches it through us, once."""
    out_fd, err_fd = (1, 2) if rank == 0 else (None, None)
    out_read, out_write = open_channel(out_fd)
    readers.append((out_read, out_fd, log))
    err_write = out_write
    if rank == 0:
        err_read, err_write = open_channel(err_fd)
        readers.append((err_read, err_fd, log))
    try:
        return subprocess.Popen(
            command,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=out_write,
            stderr=err_write,
            process_group=0,
            preexec_fn=_before_worker(os.getpid()),
        )
    finally:
        for fd in {out_write, err_write}:
            os.close(fd)


def _before_worker(parent: int) -> Callable[[], None]:
    """What a worker does before it becomes Python.

    It holds back the signals that we hand on until it listens to them (`dist_finetune.signals`): one that comes while
    the interpreter starts would end it, and with it a job that has to answer with exit code 75. And it asks Linux to
    kill it when we die, however we die: an orphan would hold its GPU.
    """
    prctl = ctypes.CDLL(None).prctl if sys.platform.startswith("linux") else None

    def prepare() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED_SIGNALS)
        if prctl is None:
            return
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    return prepare


@contextlib.contextmanager
def _forward_signals(workers: list[Worker], world_size: int) -> Iterator[tuple[list[int], list[int]]]:
    """Hands signals to the workers, who save and end by themselves; their exit code tells how it went. Gives the list
    of those that came, and of those among them that came before all workers were there, and were handed to none."""
    received: list[int] = []
    early: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(workers) < world_size:
            early.append(number)
        else:
            _send(workers, number)

    before = {number: signal.signal(number, forward) for number in FORWARDED_SIGNALS}
    try:
        yield received, early
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _send(workers: list[Worker], number: int) -> None:
    for worker in workers:
        if worker.poll() is None:
            worker.send_signal(number)


def _wait(
    workers: list[Worker],
    logs: list[RankLog],
    warnings: Warnings,
    log_folder: Path,
    log_folder_ready: Callable[[], bool],
) -> int | None:
    """The rank that failed first, or None; waits for all workers, or for a failure and what fails right after it."""
    placed, tick, deadline = False, 0, float("inf")
    failures: dict[int, tuple[bool, int, bool, int]] = {}
    while time.monotonic() < deadline:
        if not placed and log_folder_ready():
            _place(logs, log_folder)
            placed = True
        _show_warnings(warnings.new_lines())
        codes = [worker.poll() for worker in workers]
        for rank, code in enumerate(codes):
            if code not in (None, 0, EXIT_STOPPED) and rank not in failures:
                # Wrong input explains itself; an abort is mostly a communication library's answer to a lost rank.
                failures[rank] = (code != UserError.exit_code, tick, code == -signal.SIGABRT, rank)
                deadline = min(deadline, time.monotonic() + SETTLE_S)
        if None not in codes:
            break
        tick += 1
        time.sleep(POLL_S)
    return min(failures, key=lambda rank: failures[rank]) if failures else None


def _show_warnings(lines: list[str]) -> None:
    with contextlib.suppress(OSError):  # a terminal that is gone must not end the job
        for line in lines:
            print(line, file=sys.stderr, flush=True)


def _place(logs: list[RankLog], folder: Path) -> None:
    for rank, log in enumerate(logs):
        log.place(folder / f"rank-{rank}.txt")


def _stop(workers: list[Worker]) -> None:
    """Ends the workers that are left and what they started: SIGTERM, then SIGKILL after a grace."""
    running = [worker for worker in workers if worker.poll() is None]
    for worker in running:
        worker.terminate()
    deadline = time.monotonic() + FAILURE_GRACE_S
    for worker in running:
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.wait(timeout=max(0.0, deadline - time.monotonic()))
    for worker in workers:
        if worker.returncode not in (0, EXIT_STOPPED):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()


def _show_message(failed: int, code: int, logs: list[RankLog], log_folder: Path) -> None:
    """The message of the failed rank as the last thing on stderr, unless rank 0 has just shown the same."""
    message = _error_message(logs[failed].tail())
    if message is None and code == UserError.exit_code:
        message = logs[failed].tail().strip()
    if message is None:
        ended = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        last_lines = "" if failed == 0 else "\n".join(logs[failed].tail().splitlines()[-TAIL_LINES:]) + "\n"
        kept = log_folder / f"rank-{failed}.txt"
        hint = f"; its output is in {kept}" if kept.exists() else ""
        memory = ", as the system does when memory runs out" if code == -signal.SIGKILL else ""
        message = f"{last_lines}error: rank {failed} of {len(logs)} {ended}{memory}{hint}"
    elif message == _error_message(logs[0].tail()):
        return
    print(message, file=sys.stderr, flush=True)


def _error_message(text: str) -> str | None:
    """The last `error: ...` of a worker's output with the lines that belong to it."""
    starts = [found.start() for found in ERROR_LINE.finditer(text)]
    return text[starts[-1] :].strip() if starts else None
