"""Output of worker processes: read through a pipe (a pseudo-terminal where ours is a terminal), shown and kept."""

import contextlib
import fcntl
import os
import pty
import re
import termios
import threading
import time
from collections.abc import Sequence
from pathlib import Path

HELD_BYTES = 1 << 20
TAIL_BYTES = 1 << 16
# As Python, logging, NCCL and torch's C++ part mark them.
WARNING = re.compile(rb"(?i:warning:)|\bWARN(ING)?\b|\[W\d{4} ")
WARNINGS_PER_RANK = 20
# Ranks mostly warn of the same, and rank 0 should be the one that is heard.
WAIT_FOR_FIRST_S = 1.0


class RankLog:
    """One rank's output: held in memory until the run's folder exists, then in a file there; the end stays at hand.

    The worker makes (or sets aside) the run's folder, so a file opened before that would land in the wrong one.
    """

    def __init__(self) -> None:
        self._held: bytes | None = b""
        self._tail = b""
        self._path: Path | None = None
        self._lock = threading.Lock()
        self._line = b""
        self._warnings: list[tuple[float, str]] = []

    def write(self, data: bytes) -> None:
        """Adds output; several readers may call this at once."""
        with self._lock:
            self._tail = (self._tail + data)[-TAIL_BYTES:]
            if self._held is not None:
                self._held = (self._held + data)[-HELD_BYTES:]
            else:
                self._append(data)
            *lines, self._line = (self._line + data).split(b"\n")
            self._line = self._line[-TAIL_BYTES:]
            found = [line.decode(errors="replace").strip() for line in lines if WARNING.search(line)]
            self._warnings += [(time.monotonic(), line) for line in found]

    def take_warnings(self, older_than_s: float) -> list[str]:
        """Lines with warnings that came at least so long ago and were not taken before."""
        with self._lock:
            until_s = time.monotonic() - older_than_s
            taken = [line for came_s, line in self._warnings if came_s <= until_s]
            self._warnings = [(came_s, line) for came_s, line in self._warnings if came_s > until_s]
        return taken

    def place(self, path: Path) -> None:
        """Writes what is held to the end of `path`, and all later output as well."""
        with self._lock:
            held, self._held, self._path = self._held, None, path
            self._append(held or b"")

    def tail(self) -> str:
        """The last part of the output."""
        return self._tail.decode(errors="replace").replace("\r\n", "\n")

    def _append(self, data: bytes) -> None:
        # A full disk must not stop the reader: a worker blocks once its pipe is full.
        with contextlib.suppress(OSError):
            if self._path is not None:
                self._path.parent.mkdir(exist_ok=True)
                with self._path.open("ab") as file:
                    file.write(data)


class Warnings:
    """Warnings of the ranks that have no terminal: each text once, and none that rank 0 has shown."""

    def __init__(self, logs: Sequence[RankLog]) -> None:
        self._logs = logs
        self._seen: set[str] = set()
        self._counts = [0] * len(logs)

    def new_lines(self, older_than_s: float = WAIT_FOR_FIRST_S) -> list[str]:
        """Lines to show, with the rank in front; those of the last `older_than_s` seconds wait for the next call."""
        self._seen.update(map(_text_of, self._logs[0].take_warnings(0)))
        shown = []
        for rank, log in enumerate(self._logs[1:], 1):
            for line in log.take_warnings(older_than_s):
                if _text_of(line) in self._seen or self._counts[rank] > WARNINGS_PER_RANK:
                    continue
                self._seen.add(_text_of(line))
                self._counts[rank] += 1
                too_many = self._counts[rank] > WARNINGS_PER_RANK
                shown.append(f"rank {rank}: " + ("further warnings are in its log" if too_many else line))
        return shown


def _text_of(line: str) -> str:
    """A line without what differs between ranks: numbers of processes, ranks and times."""
    return re.sub(r"\d+", "#", line)


def open_channel(terminal_fd: int | None) -> tuple[int, int]:
    """(read, write) file descriptors; the write end is a terminal of the same width where `terminal_fd` is one."""
    if terminal_fd is None or not os.isatty(terminal_fd):
        return os.pipe()
    read_fd, write_fd = pty.openpty()
    with contextlib.suppress(OSError):
        size = fcntl.ioctl(terminal_fd, termios.TIOCGWINSZ, b"\0" * 8)
        fcntl.ioctl(write_fd, termios.TIOCSWINSZ, size)
        # Our own terminal turns newlines into CR LF already.
        attributes = termios.tcgetattr(write_fd)
        attributes[1] &= ~termios.OPOST
        termios.tcsetattr(write_fd, termios.TCSANOW, attributes)
    return read_fd, write_fd


def copy_in_background(read_fd: int, terminal_fd: int | None, log: RankLog) -> threading.Thread:
    """A started thread that copies all of `read_fd` to the log and the terminal, and then closes `read_fd`."""

    def copy() -> None:
        showing = terminal_fd is not None
        while data := _read(read_fd):
            log.write(data)
            if showing and terminal_fd is not None:
                # `run ... | head` closes our output; the job goes on.
                showing = _write_all(terminal_fd, data)
        os.close(read_fd)

    thread = threading.Thread(target=copy, daemon=True)
    thread.start()
    return thread


def _read(fd: int) -> bytes:
    try:
        return os.read(fd, 1 << 16)
    except OSError:
        return b""  # a pseudo-terminal whose other end is closed reports an error instead of its end


def _write_all(fd: int, data: bytes) -> bool:
    try:
        while data:
            data = data[os.write(fd, data) :]
    except OSError:
        return False
    return True
