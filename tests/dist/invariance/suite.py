"""Runs cases: references first, then one launch for each number of processes."""

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import finish, run_ranks, torchrun

from invariance.cases import LARGE_STEPS, WORLD_SIZES, Case, reference_of
from invariance.compare import GPU_TOLERANCES, TOLERANCES, beyond
from invariance.configs import write_inputs

WORKER = Path(__file__).with_name("worker.py")


@dataclass(frozen=True)
class Result:
    """A case and its distances from the reference; `problem` says what is wrong, empty where nothing is."""

    case: Case
    distance: dict[str, float]
    seconds: float
    problem: str


def run_cases(
    cases: Sequence[Case], folder: Path, timeout_s: float, num_gpus: int = 0, large_steps: int = LARGE_STEPS
) -> list[Result]:
    """The results of all cases, and of their references too, on so many GPUs or else on the CPU. Each launch ends
    within `timeout_s`."""
    inputs = write_inputs(folder / "inputs")
    m = inputs.material
    paths = [m.folder, m.bert, m.cnn_weights, m.train, m.validation, m.images, m.validation_images]
    places = {"bert": str(inputs.bert), "material": [str(p) for p in paths], "large_steps": large_steps}
    (inputs.folder / "inputs.json").write_text(json.dumps(places), encoding="utf-8")
    references = sorted({reference_of(case) for case in cases}, key=lambda case: case.name)
    rest = [case for case in cases if case not in references]
    results = []
    for size in WORLD_SIZES:
        mine = [*(references if size == 1 else ()), *(case for case in rest if case.world_size == size)]
        shares = _halves(mine) if size == 1 else [mine]
        with ThreadPoolExecutor() as pool:  # of threads that wait for a launch each
            launches = [pool.submit(_launch, share, size, folder, timeout_s, num_gpus) for share in shares if share]
            results += [result for launch in launches for result in launch.result()]
    assert len(results) == len(rest) + len(references), f"{len(results)} of {len(rest) + len(references)} cases ran"
    return results


def _halves(cases: Sequence[Case]) -> list[list[Case]]:
    """Cases of one process in two lists, for two cores: a case comes after its reference, in the same list."""
    halves: list[list[Case]] = [[], []]
    for case in cases:
        has_reference = next((half for half in halves if reference_of(case) in half), None)
        (has_reference or min(halves, key=lambda half: sum(c.cost for c in half))).append(case)
    return halves


def _launch(cases: Sequence[Case], size: int, folder: Path, timeout_s: float, num_gpus: int) -> list[Result]:
    place = Path(tempfile.mkdtemp(prefix=f"launch{size}-", dir=folder))
    listed, out = place / "cases.json", place / "results.jsonl"
    listed.write_text(json.dumps([case.to_json() for case in cases]), encoding="utf-8")
    done = _ranks(size, [listed, folder / "inputs", out, folder / "references"], timeout_s, place, num_gpus)
    lines = out.read_text(encoding="utf-8").splitlines() if out.exists() else []
    rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
    errors = "\n".join(line for line in done.stderr.splitlines() if "Error: " in line)
    assert done.returncode == 0, f"{cases[len(rows)].name}:\n{errors[:2000]}\n{done.stderr[-4000:]}"
    return [_result(row, GPU_TOLERANCES if num_gpus else TOLERANCES) for row in rows]


def _ranks(
    size: int, arguments: Sequence[Path], timeout_s: float, place: Path, num_gpus: int
) -> subprocess.CompletedProcess[str]:
    if not num_gpus:
        return run_ranks(size, WORKER, arguments, timeout_s, place)
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(num_gpus)))
    environment = {"CUDA_VISIBLE_DEVICES": gpus, "DS_ACCELERATOR": "cuda", "NVIDIA_TF32_OVERRIDE": "0"}
    return finish([*torchrun(size), str(WORKER), *map(str, arguments)], timeout_s, place, **environment)


def _result(row: dict[str, Any], tolerances: dict[str, float]) -> Result:
    distance = row.get("distance", {})
    far = ", ".join(f"{key} {value:.1e}" for key, value in beyond(distance, tolerances).items())
    return Result(Case(**row["case"]), distance, row["seconds"], row["error"] or far)
