"""metrics.jsonl as columns, in bounded time whatever its length."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dist_finetune.run_folder import json_row, number

WHOLE_BYTES = 25_000_000  # a larger file is thinned: a page shows no more points anyway
KEPT = '"eval/'  # rows that hold this are never left out


@dataclass(frozen=True)
class Metrics:
    """Values by key against optimizer steps, in order of steps; times in seconds since the epoch."""

    series: dict[str, tuple[np.ndarray, np.ndarray]]
    times: np.ndarray
    """Of the rows, as read."""
    train_s: float
    stride: int
    """1, or k where one of k training steps was read."""

    @property
    def last_step(self) -> int:
        """The last optimizer step that was logged, 0 before the first."""
        return max((int(steps[-1]) for steps, _ in self.series.values() if len(steps)), default=0)

    def of(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of a key, both empty where it was never logged."""
        return self.series.get(key, (np.zeros(0, int), np.zeros(0)))

    def last(self, key: str) -> float | None:
        """The last value of a key."""
        _, values = self.of(key)
        return float(values[-1]) if len(values) else None


def read_metrics(path: Path) -> Metrics:
    """The rows of a metrics file; empty without one. A last line that was cut off is left out."""
    stride = max(1, -(-path.stat().st_size // WHOLE_BYTES)) if path.exists() else 1
    columns: dict[str, tuple[list[int], list[float]]] = {}
    times = []
    for row in _rows(path, stride) if path.exists() else ():
        step = int(row["step"])
        times.append(float(row.get("time", 0.0)))
        for key, value in row.items():
            if key not in ("step", "time") and isinstance(value, int | float | None):
                steps, values = columns.setdefault(key, ([], []))
                steps.append(step)
                values.append(number(value))
    series = {key: _ordered(*column) for key, column in columns.items()}
    step_s = series.get("perf/step_s", (np.zeros(0), np.zeros(0)))[1]
    return Metrics(
        series=series,
        times=np.array(times),
        train_s=float(np.nansum(step_s)) * stride,
        stride=stride,
    )


def _rows(path: Path, stride: int) -> Iterator[dict[str, Any]]:
    last = ""
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file):
            last = line
            if number % stride == 0 or KEPT in line:
                last = ""
                yield from _of_a_step(line)
    yield from _of_a_step(last)  # the end of the curve, where it was thinned out


def _of_a_step(line: str) -> Iterator[dict[str, Any]]:
    row = json_row(line)
    if row and isinstance(row.get("step"), int):
        yield row


def _ordered(steps: list[int], values: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """By step, each step once: the last value counts, as an evaluation may be done again after a resume."""
    found = dict(zip(steps, values, strict=True))
    order = sorted(found)
    return np.array(order), np.array([found[step] for step in order], dtype=float)
