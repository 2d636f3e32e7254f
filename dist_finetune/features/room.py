"""Whether features fit into memory, so that scikit-learn can have all of them at once."""

from collections.abc import Iterator
from pathlib import Path

COPIES = 3
"""In float64, while a head is fitted: as read (float32, twice), as float64, standardised."""
# Limit, use, and that part of the use which is cached files and given up where memory is wanted.
VERSION_2 = ("memory.max", "memory.current", "inactive_file")
VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def fits(num_rows: int, num_features: int, num_processes: int, available: int) -> bool:
    """Whether each of so many processes on this machine can fit a head on features (N, D) in memory."""
    return COPIES * 8 * num_rows * num_features * num_processes <= available


def available_bytes(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory that this machine, or the container or SLURM job that this process is in, has left."""
    lines = (proc / "meminfo").read_text(encoding="utf-8").splitlines()
    free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    for group, (limit, used, cached) in _groups(proc, cgroup):
        try:
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            taken = int((group / used).read_text()) - int(stat.get(cached, 0))
            free = min(free, int((group / limit).read_text()) - taken)
        except (OSError, ValueError):  # not there, or "max"
            continue
    return max(0, free)


def _groups(proc: Path, cgroup: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """The control groups of memory that this process is in, each within the next: any of them may have a limit."""
    mine = proc / "self" / "cgroup"
    for line in mine.read_text(encoding="utf-8").splitlines() if mine.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = cgroup / "memory" if controllers else cgroup
        own = root / path.lstrip("/")
        # A container may see the path that its group has outside; its own limit is at the root then.
        for group in (own, *own.parents):
            if group.is_relative_to(root):
                yield group, VERSION_1 if controllers else VERSION_2
