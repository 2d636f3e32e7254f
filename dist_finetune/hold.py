"""One job at a time writes a run's folder: a second one waits a little for the first to end, and is refused.

The job that writes holds a hidden file there, by the rules of `turns.py`, which hold on disks that nodes share: a
killed job's hold is free at once on its own machine, and elsewhere once nothing has touched the file for a minute.
"""

import json
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

from dist_finetune.errors import TrainingError, UserError
from dist_finetune.turns import BEAT_S, STALE_S, Queue, Turn, latest

NAME = "writer"  # its files are .writer.turn-0 and so on
LOOK_EVERY_S = 1.0
PATIENCE_S = STALE_S + 2 * BEAT_S  # to see that a job of another machine is gone; one that stops may be saving


class LostHold(TrainingError):
    """This job stood still for so long that another one goes on with the run: its folder is that one's."""


class Hold:
    """The right to write a run's folder: this job's from `take` until `release`, or the end of the process."""

    def __init__(
        self, folder: Path, say: Callable[[str], None] = lambda _: None, between: Callable[[], None] = lambda: None
    ) -> None:
        """`between` is called while it waits for another job, and may raise to end that."""
        self._folder, self._say, self._between = folder, say, between
        self._turn: Turn | None = None

    def take(self, patience_s: float = PATIENCE_S) -> bool:
        """True where the folder, which must be there, was not this job's before. Raises UserError that names the job
        which has it, or says why nothing can be written."""
        if self._turn:
            return False
        queue, deadline, is_told = Queue(self._folder / NAME), time.monotonic() + patience_s, False
        while True:
            try:
                self._turn = queue.take()
            except OSError as error:
                raise UserError(cannot_write(self._folder, error)) from None
            if self._turn:
                return True
            if time.monotonic() > deadline:
                raise UserError(
                    f"{self._folder} is being written by another job, {self._holder()}. Wait for its end, or have it "
                    f"save and stop: touch {shlex.quote(str(self._folder / 'STOP'))}; name=... makes another run"
                )
            if not is_told:
                is_told = True
                self._say(f"{self._folder} is held by {self._holder()}: waiting up to {patience_s:.0f} s for its end")
            self._between()
            time.sleep(min(LOOK_EVERY_S, patience_s / 4))

    @property
    def is_lost(self) -> bool:
        """True where this job stood still for so long that another one took over."""
        return self._turn is not None and latest(self._turn.path) not in (None, self._turn.path)

    def require(self) -> None:
        """Raises LostHold where the hold is lost: nothing more may be written."""
        if self.is_lost:
            raise LostHold(
                f"{self._folder}: this process stood still for more than {STALE_S:.0f} s, and another job, "
                f"{self._holder()}, has gone on with the run since. Nothing of this one is saved any more"
            )

    def moved(self, folder: Path) -> None:
        """What was held has another name now, under which nobody holds it; the old name is free to be taken."""
        if self._turn:
            self._turn.path = folder / self._turn.path.name
            self._turn.end(is_done=True)
            self._turn = None

    def release(self) -> None:
        """Lets the next job have the folder."""
        if self._turn:
            self._turn.end(is_done=not self.is_lost)  # else the files are the other job's
            self._turn = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _holder(self) -> str:
        turn = latest(self._folder / f".{NAME}.turn-0")
        try:
            told = json.loads(turn.read_text(encoding="utf-8")) if turn else {}
            return f"process {told['pid']} on {told['host'].split()[0]}"
        except (OSError, ValueError, LookupError):  # it is just being written, or has gone
            return "whose name can't be read"


def cannot_write(folder: Path, error: OSError) -> str:
    """The words for a run folder that can't be made or written."""
    return f"{folder}: can't be written: {error.strerror or error}; choose another output=... or name=..."
