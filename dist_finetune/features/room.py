"""Whether features fit into memory, so that scikit-learn can have all of them at once."""

from pathlib import Path

COPIES = 3
"""In float64, while a head is fitted: as read (float32, twice), as float64, standardised."""
CGROUPS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
"""Limit and use of a container or a SLURM job, version 2 and 1."""


def fits(num_rows: int, num_features: int, num_processes: int, available: int) -> bool:
    """Whether each of so many processes on this machine can fit a head on features (N, D) in memory."""
    return COPIES * 8 * num_rows * num_features * num_processes <= available


def available_bytes(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory that this machine, or the container that this process is in, has left."""
    lines = (proc / "meminfo").read_text(encoding="utf-8").splitlines()
    free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    for limit, used in CGROUPS:
        try:
            free = min(free, int((cgroup / limit).read_text()) - int((cgroup / used).read_text()))
        except (OSError, ValueError):  # not there, or "max"
            continue
    return max(0, free)
