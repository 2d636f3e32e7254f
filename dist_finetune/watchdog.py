"""A rank that hangs is found and named, by the ranks that wait for it.

A thread on each rank writes down what its main thread is doing, into a small file of the run folder, which also works
where the rendezvous store hangs together with rank 0. Where a rank's own loop has not moved for most of
`launch.timeout` (of `launch.file_timeout`, where ranks wait for one that reads or writes), its thread reads the others'
files and ends the process with a message, before the collective's own timeout, which could not say who is absent.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from dist_finetune.errors import TrainingError
from dist_finetune.spec import LaunchSpec
from dist_finetune.world import World, waits_for_files

FOLDER = "ranks"
PART_OF_TIMEOUT = 0.8
LOOKS_PER_TIMEOUT = 50
LOOKS_TO_WAIT = 3  # files of another node may be seen late; a rank that is alive has written anew by then
WAITING_IN = (
    "torch/distributed/",
    "torch/autograd/",
    "torch/nn/modules/_functions.py",  # SyncBatchNorm
    "deepspeed/",
    "dist_finetune/engine/precision.py",  # whether gradients are finite
    "dist_finetune/stopping.py",
    "dist_finetune/world.py",
)
DEVICE_READS = (".tolist()", ".item()", ".cpu()", '.to("cpu"')
"""On a GPU these wait for what is queued there, and so for collectives that other ranks have not come to."""


@dataclass(frozen=True)
class Pulse:
    """What a rank last said of itself: how far it is, where in the code, and whether it waits for other ranks there."""

    rank: int
    host: str
    beat: int
    num_calls: int
    place: str
    waits: bool
    verdict: str | None
    """What it ended the job with, for the others to repeat: to them it is now silent itself."""


class Watchdog:
    """Runs beside a training loop whose `progress` counts calls that all ranks make. Does nothing for a single rank."""

    def __init__(
        self,
        world: World,
        run: Path,
        launch: LaunchSpec,
        progress: Callable[[], int],
        end: Callable[[TrainingError], None],
    ) -> None:
        self._world, self._folder, self._launch = world, run / FOLDER, launch
        self._progress, self._end = progress, end
        self._main = threading.get_ident()
        self._leave = threading.Event()
        self._beat = 0
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if self._world.world_size > 1:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._leave.set()
        if self._thread:
            self._thread.join()
            with contextlib.suppress(OSError):
                self._file(self._world.rank).unlink(missing_ok=True)
                self._folder.rmdir()  # the last one; until then it is not empty

    def _watch(self) -> None:
        look_every_s = max(0.2, self._launch.timeout / LOOKS_PER_TIMEOUT)
        seen, since = (-1, False), time.monotonic()
        while not self._leave.wait(look_every_s):
            self._write()
            if self._state() != seen:
                seen, since = self._state(), time.monotonic()
            elif time.monotonic() - since > PART_OF_TIMEOUT * self._timeout_s(seen[1]):
                before = self._read()
                for _ in range(LOOKS_TO_WAIT):
                    if self._leave.wait(look_every_s):
                        return
                    self._write()
                if self._state() == seen:
                    now = self._read()
                    waited_s = time.monotonic() - since
                    found = next((pulse.verdict for pulse in now.values() if pulse.verdict), None)
                    self._stop(found or hang_message(before, now, self._world.world_size, waited_s))

    def _state(self) -> tuple[int, bool]:
        """How far this rank is, and whether it waits for files."""
        return self._progress(), waits_for_files()

    def _timeout_s(self, for_files: bool) -> float:
        return max(self._launch.timeout, self._launch.file_timeout) if for_files else self._launch.timeout

    def _stop(self, message: str) -> None:
        """The main thread waits in a collective that nobody will finish: only the process as a whole can end."""
        self._write(message)
        try:
            self._end(TrainingError(message))
        finally:
            sys.stderr.write(f"error: {message}\n")
            sys.stderr.flush()
            os._exit(TrainingError.exit_code)

    def _write(self, verdict: str | None = None) -> None:
        """Says what this rank is doing, whole or not at all. A disk that is full or gone must not stop the thread."""
        self._beat += 1
        place, waits = place_of(self._main)
        host, file = socket.gethostname(), self._file(self._world.rank)
        pulse = Pulse(self._world.rank, host, self._beat, self._progress(), place, waits, verdict)
        new = file.with_suffix(".new")
        try:
            self._folder.mkdir(exist_ok=True)
            new.write_text(json.dumps(asdict(pulse)) + "\n", encoding="utf-8")
            new.replace(file)
        except OSError:
            return

    def _read(self) -> dict[int, Pulse]:
        pulses = {}
        for rank in range(self._world.world_size):
            try:
                pulses[rank] = Pulse(**json.loads(self._file(rank).read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError):
                continue  # not there yet, or just being written
        return pulses

    def _file(self, rank: int) -> Path:
        return self._folder / f"rank-{rank:05d}.json"


def place_of(thread: int) -> tuple[str, bool]:
    """The innermost line of this package that a thread is in, as text, and whether it waits for other ranks there."""
    frame = sys._current_frames().get(thread)
    if frame is None:
        return "ended", False
    stack = traceback.extract_stack(frame)
    package = Path(__file__).parent
    ours = next((f for f in reversed(stack) if Path(f.filename).is_relative_to(package)), stack[-1])
    innermost = stack[-1]
    waits = any(part in innermost.filename for part in WAITING_IN)
    waits = waits or any(read in (innermost.line or "") for read in DEVICE_READS)
    inside = "" if innermost is ours else f", inside {Path(innermost.filename).name} line {innermost.lineno}"
    return f"{Path(ours.filename).name} line {ours.lineno}, {ours.line}{inside}", waits


def hang_message(before: dict[int, Pulse], now: dict[int, Pulse], world_size: int, waited_s: float) -> str:
    """Names the ranks that keep the job waiting: silent ones, else those behind, else those that wait for nobody."""
    silent = [r for r in range(world_size) if r not in now or (r in before and now[r].beat == before[r].beat)]
    furthest = max((pulse.num_calls for pulse in now.values()), default=0)
    behind = [rank for rank, pulse in now.items() if pulse.num_calls < furthest]
    alone = [rank for rank, pulse in now.items() if not pulse.waits]
    if silent:
        named, what = silent, "no longer answers (its process is stopped, or its machine is gone)"
    elif behind or (alone and len(alone) < world_size):
        named, what = behind or alone, "hangs"
    else:
        named, what = list(range(world_size)), "all wait for each other: a network between them may be down"
    ranks = ", ".join(f"{rank} on {now[rank].host}" if rank in now else str(rank) for rank in named[:8])
    lines = [
        f"  rank {rank}: {now[rank].place}" if rank in now else f"  rank {rank}: nothing" for rank in range(world_size)
    ]
    shown = [line for rank, line in enumerate(lines) if rank in named[:8] or rank < 8]
    return (
        f"no step for {waited_s:.0f} s (launch.timeout or file_timeout): rank {ranks} {what}. What each rank does:\n"
        + "\n".join(shown)
        + "\nThe run can be resumed from its newest checkpoint."
    )
