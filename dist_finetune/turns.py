"""Jobs that want the same thing at once, to fill a cache entry or to write a run folder: one does, the others wait, or
take over where it is gone.

A job's turn is a file `.<name>.turn-<n>`, made with O_EXCL, which holds on disks that nodes share as well; the highest
n counts. Its job touches it every few seconds, and says so in it where it gives up: of all who see that, or that
nothing touches it any more, exactly one makes n + 1. Once the entry is there, or the run over, the files go.
"""

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from dist_finetune.errors import DistFinetuneError

BEAT_S = 5.0
STALE_S = 60.0
"""A job that has not touched its file for so long, by the clock of who looks at it, is taken for gone."""
GIVEN_UP = "given up"
BOOT_ID, PID_NAMESPACE = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
_NOWHERE = secrets.token_hex(8)


class LostTurn(DistFinetuneError):
    """This job stood still for so long that another one has the turn."""


@dataclass
class Turn:
    """A turn that is ours, touched by a thread until it is over."""

    path: Path
    _over: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        threading.Thread(target=self._beat, name="turn", daemon=True).start()

    @property
    def is_lost(self) -> bool:
        """True where another job has taken over."""
        return latest(self.path) != self.path

    def end(self, is_done: bool) -> None:
        """Ends the turn: the entry is there, or another job (or this one, started again) may go on."""
        self._over.set()
        if is_done:
            for path in _all(self.path):
                with contextlib.suppress(OSError):  # in a folder that users share, one's files are not another's
                    path.unlink(missing_ok=True)
            return
        with contextlib.suppress(OSError), self.path.open("r+", encoding="utf-8") as file:
            file.truncate()
            file.write(GIVEN_UP)

    def _beat(self) -> None:
        while not self._over.wait(BEAT_S):
            with contextlib.suppress(OSError):  # the entry may be there, or the disk be away for a while
                os.utime(self.path)


class Queue:
    """What a job knows of an entry that it waits for."""

    def __init__(self, entry: Path) -> None:
        self._first = entry.with_name(f".{entry.name}.turn-0")
        self._seen: tuple[Path, int] | None = None
        self._seen_s = 0.0

    def take(self) -> Turn | None:
        """Our turn, or None as long as another job is at work. Never waits. Raises OSError where nothing can be
        written."""
        before = latest(self._first)
        if before is not None and self._is_at_work(before):
            return None
        path = self._first if before is None else before.with_suffix(f".turn-{_number(before) + 1}")
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:  # another job was faster
            return None
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump({"host": this_host(), "pid": os.getpid(), "started": _started(os.getpid())}, file)
        return Turn(path)

    def _is_at_work(self, turn: Path) -> bool:
        """Whether the job of a turn lives: its process, where that is one of this machine, and else by its touches."""
        try:
            with turn.open(encoding="utf-8") as file:  # opened, as NFS looks anew then
                touched, text = os.fstat(file.fileno()).st_mtime_ns, file.read()
        except FileNotFoundError:
            return True  # the entry has just got there; the caller looks for it next
        now = time.monotonic()
        if (turn, touched) != self._seen:
            self._seen, self._seen_s = (turn, touched), now
        if now - self._seen_s > STALE_S:
            return False
        if text == GIVEN_UP:
            return False
        try:
            told = json.loads(text)
        except ValueError:  # not written yet
            return True
        return bool(told["host"] != this_host() or _started(told["pid"]) == told["started"])


def _number(turn: Path) -> int:
    return int(turn.suffix.removeprefix(".turn-"))


def _all(turn: Path) -> Iterator[Path]:
    return turn.parent.glob(f"{turn.stem}.turn-*")


def latest(turn: Path) -> Path | None:
    """Of the turns that lie beside one, or would, that which counts."""
    return max(_all(turn), key=_number, default=None)


def this_host() -> str:
    """This machine since it was started, or the container: where process numbers mean the same. A place of its own for
    a process whose sandbox hides that."""
    try:
        place = f"{BOOT_ID.read_text(encoding='utf-8').strip()} {PID_NAMESPACE.readlink()}"
    except OSError:
        place = _NOWHERE
    return f"{socket.gethostname()} {place}"


def _started(pid: int) -> str | None:
    """When a process started, in the kernel's ticks; None where there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]
