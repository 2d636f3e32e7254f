"""Signals that ask a run to stop. Imports nothing heavy, so that a signal during start-up is not lost.

SLURM sends SIGUSR1 before a time limit and SIGTERM at preemption; torchrun and `accelerate launch` pass SIGUSR1 on only
with PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGUSR1 in their environment.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SECOND_SIGNAL_AFTER_S = 2.0  # launchers and terminals deliver one wish twice, at once; a later signal means: now
PR_SET_PDEATHSIG = 1
LOOK_EVERY_S = 0.5


def hold_back_signals() -> None:
    """Keeps the signals pending until `StopSignals` takes them: importing torch must not be the moment one kills."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def let_signals_through() -> None:
    """Ends what `run` began for its workers: work that saves nothing before its end is ended by a signal at once."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def follow_launcher(env: Mapping[str, str] = os.environ) -> None:
    """Has a worker get a SIGTERM when its launcher is gone, however it went. torchrun (or accelerate launch) that is
    killed with -9 leaves its workers behind, `deepspeed` after any signal: they would go on and hold their GPUs."""
    if not sys.platform.startswith("linux"):
        return
    is_deepspeed = bool(env.get("CROSS_SIZE") and env.get("LOCAL_SIZE"))
    if env.get("TORCHELASTIC_RUN_ID") or is_deepspeed:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    runner = _parent_of(os.getppid()) if is_deepspeed else None
    # `deepspeed` starts a process that starts the workers, which does not notice that the first one is gone.
    if runner and "deepspeed" in _command_of(runner):
        threading.Thread(target=_follow, args=(os.getppid(), runner), name="launcher", daemon=True).start()


def _follow(launcher: int, runner: int) -> None:
    """Sends this process a SIGTERM once `runner` is no longer the parent of `launcher`."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # they are for the main thread, which may hold them back
    while _parent_of(launcher) == runner:
        time.sleep(LOOK_EVERY_S)
    os.kill(os.getpid(), signal.SIGTERM)


def _parent_of(process: int) -> int | None:
    try:
        # the name, in brackets, may hold anything
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def _command_of(process: int) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


class StopSignals:
    """Notes the first signal; a second one, some time later, ends the process at once.

    A thread hears of signals at the moment they come: Python's own handlers wait for the main thread, which may be deep
    in a collective. Outside of the main thread, as in some notebooks, signals stay with whoever has them.
    """

    def __init__(self) -> None:
        self.first: signal.Signals | None = None
        self._first_s = 0.0
        self._before: dict[int, Any] = {}
        self._wake = self._wake_before = -1

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            hear, self._wake = os.pipe()
            os.set_blocking(self._wake, False)
            self._wake_before = signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
            # without a handler of Python's nothing would be written to the pipe
            self._before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
            threading.Thread(target=self._listen, args=(hear,), name="signals", daemon=True).start()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before:
            signal.set_wakeup_fd(self._wake_before)
            for number, handler in self._before.items():
                signal.signal(number, handler)
            os.write(self._wake, b"\0")
            os.close(self._wake)

    def _listen(self, hear: int) -> None:
        while number := os.read(hear, 1)[0]:
            if number in SIGNALS:
                self._note(signal.Signals(number))
        os.close(hear)

    def _note(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if self.first is None:
            self.first, self._first_s = number, now
        elif now - self._first_s > SECOND_SIGNAL_AFTER_S:
            os._exit(128 + number)  # the last complete checkpoint stays; a half-written one is no checkpoint
