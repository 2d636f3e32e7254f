"""Runs many cases in one process group: worker.py CASES.json INPUTS OUT REFERENCES

For each case rank 0 appends a line to OUT: how far it is from its reference, or the error it ended with. A case that is
a reference itself, and has none in REFERENCES yet, leaves it there.
"""

import json
import os
import shutil
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
sys.path.insert(0, str(Path(__file__).parents[1]))

import no_page  # noqa: F401
import torch
import torch.distributed as dist
import yaml
from material import Material

from dist_finetune.data.batches import training_steps
from dist_finetune.errors import DistFinetuneError
from dist_finetune.run import train
from dist_finetune.spec_file import load_spec
from dist_finetune.world import gather_objects
from invariance.cases import Case, reference_of
from invariance.compare import Outcome, compare, read_outcome
from invariance.configs import Inputs, config_of


def run_case(case: Case, inputs: Inputs, work: Path) -> tuple[Outcome | None, str]:
    """What a case left (on rank 0), or the error it ended with."""
    seen: dict[int, list[int]] = {}
    loop = sys.modules["dist_finetune.training"]

    def noting(*args: Any, **kwargs: Any) -> Any:
        for step in training_steps(*args, **kwargs):
            ids = [i for micro in step.micro_batches if not micro.is_filler for i in micro.ids.tolist()]
            seen.setdefault(step.step, []).extend(ids)
            yield step

    loop.training_steps = noting  # type: ignore[attr-defined]
    return _train(case, inputs, work, seen)


def _train(case: Case, inputs: Inputs, work: Path, seen: dict[int, list[int]]) -> tuple[Outcome | None, str]:
    config = work / "case.yaml"
    if dist.get_rank() == 0:
        shutil.rmtree(work / "runs", ignore_errors=True)
        text = yaml.safe_dump({**config_of(case, inputs), "name": "case", "output": str(work / "runs")})
        config.write_text(text, encoding="utf-8")
    dist.barrier()
    error = ""
    try:
        train(load_spec(config, []))
    except DistFinetuneError as problem:
        error = f"{type(problem).__name__}: {problem}"
    parts = gather_objects(seen)
    if error or dist.get_rank() != 0:
        return None, error
    steps = {step: sorted(i for part in parts for i in part[step]) for step in parts[0]}
    return read_outcome(work / "runs" / "case", [steps[s] for s in sorted(steps)], case.accumulation), ""


def main() -> None:
    cases_file, folder, out, references = (Path(argument) for argument in sys.argv[1:5])
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=3))
    is_first = dist.get_rank() == 0
    places = json.loads((folder / "inputs.json").read_text(encoding="utf-8"))
    material = Material(*(Path(p) for p in places["material"]))
    inputs = Inputs(folder, Path(places["bert"]), material, places["large_steps"])
    work = out.with_suffix(".work")
    work.mkdir(exist_ok=True)
    for values in json.loads(cases_file.read_text(encoding="utf-8")):
        case = Case(**values)
        started = time.perf_counter()
        outcome, error = run_case(case, inputs, work)
        if not is_first:
            continue
        row = {"case": case.to_json(), "error": error, "seconds": round(time.perf_counter() - started, 2)}
        place = references / case.reference
        if outcome and case == reference_of(case) and not place.exists():
            outcome.write(place)
        elif outcome:
            row["distance"] = compare(outcome, Outcome.read(place))
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
