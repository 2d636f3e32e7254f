"""Evaluation gives every rank the same metrics, whatever their number, and the logits to the one that needs them."""

from pathlib import Path
from typing import Any

import pytest
from harness import read_json, run_ranks

pytestmark = pytest.mark.dist

WORKER = Path(__file__).with_name("evaluate_worker.py")


def by_rank(num_processes: int, folder: Path) -> list[dict[str, Any]]:
    folder.mkdir()
    done = run_ranks(num_processes, WORKER, [folder / "found"], 120, folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return [read_json(folder / f"found.{rank}") for rank in range(num_processes)]


def test_all_ranks_know_the_metrics_and_the_first_one_the_logits(tmp_path: Path) -> None:
    (alone,) = by_rank(1, tmp_path / "1")
    assert len(alone) == 4
    assert all(task["logits"] and task["metrics"] for task in alone.values())
    for num in (2, 4):
        first, *others = by_rank(num, tmp_path / str(num))
        assert first == alone, "bit for bit"
        for other in others:
            for task, found in other.items():
                assert found == {"metrics": alone[task]["metrics"], "logits": "", "labels": "", "rows": ""}
