"""Runs cases: references first, then one launch for each number of processes."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import finish, torchrun

from invariance.cases import WORLD_SIZES, Case, reference_of
from invariance.compare import beyond
from invariance.configs import write_inputs

WORKER = Path(__file__).with_name("worker.py")


@dataclass(frozen=True)
class Result:
    """A case and its distances from the reference; `problem` says what is wrong, empty where nothing is."""

    case: Case
    distance: dict[str, float]
    seconds: float
    problem: str


def run_cases(cases: Sequence[Case], folder: Path, timeout_s: float) -> list[Result]:
    """The results of all cases, and of their references too. Each launch ends within `timeout_s`."""
    inputs = write_inputs(folder / "inputs")
    m = inputs.material
    paths = [m.folder, m.bert, m.cnn_weights, m.train, m.validation, m.images, m.validation_images]
    places = {"bert": str(inputs.bert), "material": [str(p) for p in paths]}
    (inputs.folder / "inputs.json").write_text(json.dumps(places), encoding="utf-8")
    references = sorted({reference_of(case) for case in cases}, key=lambda case: case.name)
    rest = [case for case in cases if case not in references]
    results = []
    for size in WORLD_SIZES:
        mine = [*(references if size == 1 else ()), *(case for case in rest if case.world_size == size)]
        if mine:
            results += _launch(mine, size, folder, timeout_s)
    assert len(results) == len(rest) + len(references), f"{len(results)} of {len(rest) + len(references)} cases ran"
    return results


def _launch(cases: Sequence[Case], size: int, folder: Path, timeout_s: float) -> list[Result]:
    listed, out = folder / f"cases{size}.json", folder / f"results{size}.jsonl"
    listed.write_text(json.dumps([case.to_json() for case in cases]), encoding="utf-8")
    arguments = [WORKER, listed, folder / "inputs", out, folder / "references"]
    done = finish([*torchrun(size), *map(str, arguments)], timeout_s, folder)
    lines = out.read_text(encoding="utf-8").splitlines() if out.exists() else []
    rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
    errors = "\n".join(line for line in done.stderr.splitlines() if "Error: " in line)
    assert done.returncode == 0, f"{cases[len(rows)].name}:\n{errors[:2000]}\n{done.stderr[-4000:]}"
    return [_result(row) for row in rows]


def _result(row: dict[str, Any]) -> Result:
    distance = row.get("distance", {})
    far = ", ".join(f"{key} {value:.1e}" for key, value in beyond(distance).items())
    return Result(Case(**row["case"]), distance, row["seconds"], row["error"] or far)
