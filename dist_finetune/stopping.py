"""Stopping early on purpose: signals, a STOP file, a time limit. All ranks agree on the step, then one checkpoint.

SLURM sends SIGUSR1 before a time limit and SIGTERM at preemption; torchrun and `accelerate launch` pass SIGUSR1 on only
with PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGUSR1 in their environment.
"""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from dist_finetune.errors import DistFinetuneError
from dist_finetune.run_folder import STOP_FILE
from dist_finetune.world import World

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
FILE_CHECK_EVERY_S = 1.0  # a shared file system should not be asked at every step
SECOND_SIGNAL_AFTER_S = 2.0  # launchers and terminals deliver one wish twice, at once; a later signal means: now
REASONS = ("", "SIGTERM", "SIGINT", "SIGUSR1", "the file STOP", "launch.time_limit")


class Stopped(DistFinetuneError):
    """The run ended early because it was told to; a checkpoint is saved. Exit code 75 (EX_TEMPFAIL: try again)."""

    exit_code = 75


@dataclass(frozen=True)
class Agreed:
    """What all ranks do at this step: stop for a reason, save because an interval in seconds is over."""

    reason: str | None
    save: bool


class StopWish:
    """Whether any rank was told to stop, known to all ranks at the same step.

    The highest of the ranks' wishes is found by a collective of two numbers that runs beside each step and is read at
    the next, so that no step waits for it.
    """

    def __init__(
        self, world: World, run: Path, time_limit_s: float | None, started_s: float, save_every_s: float | None
    ) -> None:
        self._world, self._file = world, run / STOP_FILE
        self._save_every_s, self._saved_s = save_every_s, time.monotonic()
        self._deadline_s = started_s + time_limit_s if time_limit_s else None
        self._wish, self._signalled_s, self._file_checked_s = 0, 0.0, 0.0
        self._sent: tuple[torch.Tensor, Any] | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopWish":
        for number in SIGNALS:
            try:
                self._before[number] = signal.signal(number, self._on_signal)
            except ValueError:  # not the main thread, as in some notebooks: signals stay with whoever has them
                break
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agreed(self) -> Agreed:
        """What the ranks wished for at the last call; the same answer on every rank. Called once a step by all."""
        answer = Agreed(None, False)
        if self._sent:
            wishes, work = self._sent
            work.wait()
            reason, save = wishes.tolist()
            answer = Agreed(REASONS[reason] or None, bool(save))
        wishes = torch.tensor([self._current_wish(), self._wants_save()])
        self._sent = (wishes, dist.all_reduce(wishes, dist.ReduceOp.MAX, async_op=True))
        return answer

    def settle(self) -> None:
        """Waits for the collective that is still under way; called before the loop is left."""
        if self._sent:
            self._sent[1].wait()
            self._sent = None

    def _current_wish(self) -> int:
        now = time.monotonic()
        if self._world.is_first and not self._wish:
            if self._deadline_s is not None and time.perf_counter() > self._deadline_s:
                self._wish = REASONS.index("launch.time_limit")
            elif now - self._file_checked_s > FILE_CHECK_EVERY_S:
                self._file_checked_s = now
                if self._file.exists():
                    self._wish = REASONS.index("the file STOP")
        return self._wish

    def _wants_save(self) -> bool:
        """True on the first rank where `checkpoint.every` is a time and that time is over."""
        if self._save_every_s is None or time.monotonic() - self._saved_s < self._save_every_s:
            return False
        self._saved_s = time.monotonic()
        return self._world.is_first

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._signalled_s and now - self._signalled_s > SECOND_SIGNAL_AFTER_S:
            os._exit(128 + number)  # the last complete checkpoint stays; a half-written one is no checkpoint
        self._signalled_s = self._signalled_s or now
        self._wish = self._wish or REASONS.index(signal.Signals(number).name)
