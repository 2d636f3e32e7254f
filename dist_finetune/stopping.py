"""Stopping early on purpose: signals, a STOP file, a time limit. All ranks agree on the step, then one checkpoint."""

import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dist_finetune.errors import DistFinetuneError
from dist_finetune.run_folder import STOP_FILE
from dist_finetune.signals import SIGNALS, StopSignals
from dist_finetune.world import World, gather_objects

FILE_CHECK_EVERY_S = 1.0  # a shared file system should not be asked at every step
ASK_EVERY_S = 0.1
"""How far apart ranks ask each other: where a step takes milliseconds, asking at each one would slow it by a tenth."""
MOST_CALLS = 16
"""Most calls between two questions, however short they were: the next ones may take longer."""
REASONS = ("", *(number.name for number in SIGNALS), "the file STOP", "launch.time_limit")


class Stopped(DistFinetuneError):
    """The run ended early because it was told to; a checkpoint is saved. Exit code 75 (EX_TEMPFAIL: try again)."""

    exit_code = 75


def refuse_if_told(signals: StopSignals) -> None:
    """Raises Stopped where this rank was told to stop while it got ready: nothing was trained that is not saved."""
    _refuse(signals.first.name if signals.first else None)


def stop_if_told(signals: StopSignals) -> None:
    """As `refuse_if_told`, on every rank at once where any was told. Collective."""
    told = gather_objects(signals.first.name if signals.first else None)
    _refuse(next((name for name in told if name), None))


def _refuse(signal: str | None) -> None:
    if signal:
        raise Stopped(f"stopped on {signal} before the first step; nothing is lost. Start it again the same way")


class Interrupted(Exception):
    """Carries the reason to stop out of a loop, to where the checkpoint is saved."""


class StopWish:
    """Whether any rank was told to stop, known to all ranks at the same step.

    The highest of the ranks' wishes is found by a collective of three numbers that runs beside a step and is read at
    the next, so that no step waits for it. The third is for how many calls it is enough, as the slowest rank has it.
    """

    def __init__(
        self,
        world: World,
        signals: StopSignals,
        run: Path,
        time_limit_s: float | None,
        started_s: float,
        save_every_s: float | None,
    ) -> None:
        self._world, self._signals, self._file = world, signals, run / STOP_FILE
        self._save_every_s, self._saved_s = save_every_s, time.monotonic()
        self._deadline_s = started_s + time_limit_s if time_limit_s else None
        self._wish, self._file_checked_s = 0, 0.0
        self._sent: tuple[torch.Tensor, Any] | None = None
        self._asked: tuple[int, float] | None = None
        self._next_call = 0
        self.save_due = False
        """True where an interval of `checkpoint.every` in seconds is over; whoever saves sets it back."""
        self.num_calls = 0
        """How often this rank has asked: it grows as long as the rank is alive and no other keeps it waiting."""

    def check(self) -> None:
        """Called by all ranks before each step and each evaluation batch; answers what they wished for when they last
        asked. Sets `save_due`, or raises Interrupted, on every rank at once."""
        reason = 0
        if self._sent:
            wishes, work = self._sent
            work.wait()
            reason, save, fewest_calls = wishes.abs().tolist()
            self.save_due, self._sent = self.save_due or bool(save), None
            if self._asked:
                self._next_call = self._asked[0] + fewest_calls
        if self.num_calls >= self._next_call:
            self._ask()
        self.num_calls += 1
        if reason:
            raise Interrupted(REASONS[reason])

    def new_pace(self) -> None:
        """Called by all ranks where what follows takes another time than what was before: batches of an evaluation,
        and steps after one."""
        self._asked, self._next_call = None, self.num_calls

    def _ask(self) -> None:
        now, calls = time.monotonic(), 1
        if self._asked:
            call_s = (now - self._asked[1]) / (self.num_calls - self._asked[0])
            calls = int(min(max(1, ASK_EVERY_S / call_s), MOST_CALLS)) if call_s else MOST_CALLS
        self._asked, self._next_call = (self.num_calls, now), self.num_calls + 1
        wishes = torch.tensor([self._current_wish(), self._wants_save(), -calls])  # the highest of -calls: the fewest
        self._sent = (wishes, dist.all_reduce(wishes, dist.ReduceOp.MAX, async_op=True))

    def settle(self) -> None:
        """Waits for the collective that is still under way; called before the loop is left."""
        if self._sent:
            self._sent[1].wait()
            self._sent = None

    def _current_wish(self) -> int:
        now = time.monotonic()
        if self._signals.first and not self._wish:
            self._wish = REASONS.index(self._signals.first.name)
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
