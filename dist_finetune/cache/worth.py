"""Whether stored activations are worth their bytes, by the measured speed of the frozen prefix and of the disk."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

SLOW_DISK = 50 * 2**20
"""Bytes a second that any disk gives. Where the cache pays even so, or costs little, no disk is measured."""
LITTLE_S = 0.5
"""A cache that costs less is kept, whatever it spares: so little time is not worth a thought."""
SAVED_S = 1.0
"""What spares less, and costs more, is not kept; to measure the disk would take as long."""
CHUNK_BYTES = 4 * 2**20
MEASURE_S = 0.5
"""For writing, and again for reading."""


@dataclass(frozen=True)
class Worth:
    """Seconds that a cache spares, and that keeping it takes, over a phase."""

    saved_s: float
    stored_s: float
    reason: str

    @property
    def pays(self) -> bool:
        return self.saved_s > self.stored_s

    @property
    def is_kept(self) -> bool:
        """Whether the cache is worth having, or too little to think about."""
        return self.pays or self.stored_s < LITTLE_S

    @property
    def is_settled(self) -> bool:
        """Whether a faster disk could not change that by anything that matters."""
        return self.is_kept or self.saved_s < SAVED_S


def weigh(num_passes: float, prefix_s: float, num_bytes: int, write_speed: float, read_speed: float) -> Worth:
    """A cache of `num_bytes` for `num_passes` over data that takes the prefix `prefix_s` a pass; speeds in bytes a
    second. It is written once and read in every pass, where without it the prefix runs in every pass."""
    saved_s = (num_passes - 1) * prefix_s
    stored_s = num_bytes / write_speed + num_passes * num_bytes / read_speed
    mib = 2**20
    return Worth(
        saved_s,
        stored_s,
        f"{num_passes:.3g} passes of {prefix_s:.3g} s through the frozen part become one, and {num_bytes / mib:,.0f} "
        f"MiB take {stored_s:.3g} s to write and read at {write_speed / mib:,.0f} and {read_speed / mib:,.0f} MiB/s",
    )


def disk_speed(folder: Path, num_bytes: int) -> tuple[float, float]:
    """Bytes a second that the disk of `folder` writes and reads, past the memory that the system lends files, from at
    most `num_bytes` and a second. Raises OSError where the folder can't be written."""
    path = folder / f".speed-{os.getpid()}"
    chunk = os.urandom(min(CHUNK_BYTES, max(4096, num_bytes)))
    written = 0
    try:
        with path.open("wb", buffering=0) as file:
            started = time.perf_counter()
            while written < num_bytes and time.perf_counter() - started < MEASURE_S:
                written += file.write(chunk)
                os.fsync(file.fileno())
            write_speed = written / (time.perf_counter() - started)
        with path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            started, read = time.perf_counter(), 0
            while time.perf_counter() - started < MEASURE_S and (piece := file.read(CHUNK_BYTES)):
                read += len(piece)
            read_speed = read / (time.perf_counter() - started)
    finally:
        path.unlink(missing_ok=True)
    return write_speed, read_speed
