"""Every way to run a training against the plainest one, as a table: python benchmarks/invariance.py [--cases N]

Trains each case of the invariance suite (models by freezes by strategies by processes by accumulation by rows) and
prints, for each model and strategy, how far losses, gradient norms, logits and weights are from one process with ddp.
Exit code 1 where a case is beyond the tolerance. The full product takes hours on two cores; --cases 150 covers every
pair of choices. --gpus runs the cases that have a GPU for each process on GPUs, at wider tolerances.
"""

# ruff: noqa: E402  (the suite lies beside the tests, not on the path)

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests" / "dist")]

from invariance.cases import LARGE_STEPS, MODELS, Case, full_product, pairwise
from invariance.compare import GPU_TOLERANCES, TOLERANCES
from invariance.suite import Result, run_cases
from rich.console import Console
from rich.table import Table

SHOWN = ("loss", "grad_norm", "logits", "weights", "metrics")
EXACT = ("ids", "lr", "predictions", "frozen")


def table_of(results: list[Result]) -> Table:
    """A line for each model, strategy and number of processes: the largest distance of its cases."""
    table = Table(title="largest distance from one process with ddp", title_justify="left")
    for column in ("model", "strategy", "processes", "cases", *SHOWN, "exact", "s a case", "beyond"):
        table.add_column(column, justify="left" if column in ("model", "strategy") else "right")
    groups: dict[tuple[str, str, int], list[Result]] = defaultdict(list)
    for result in results:
        if result.distance or result.problem:
            groups[result.case.model, result.case.strategy, result.case.world_size].append(result)
    for (model, strategy, size), found in sorted(groups.items()):
        worst = {key: max((r.distance[key] for r in found if r.distance), default=float("nan")) for key in TOLERANCES}
        exact = "yes" if all(worst[key] == 0 for key in EXACT) else "no"
        seconds = sum(r.seconds for r in found) / len(found)
        far = sum(bool(r.problem) for r in found)
        numbers = (f"{worst[key]:.1e}" for key in SHOWN)
        table.add_row(model, strategy, str(size), str(len(found)), *numbers, exact, f"{seconds:.1f}", str(far))
    return table


def chosen_cases(args: argparse.Namespace) -> list[Case]:
    cases = pairwise(args.cases, args.models) if args.cases else full_product()
    most = min(args.most_processes, torch.cuda.device_count()) if args.gpus else args.most_processes
    return [c for c in cases if c.model in args.models and c.world_size <= most]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cases", type=int, help="a cover of all pairs of choices, filled up to so many; default: all")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--large-steps", type=int, default=LARGE_STEPS, help="steps of MiniLM and EfficientNet")
    parser.add_argument("--most-processes", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="an empty folder for the runs; default: a temporary one")
    parser.add_argument("--json", type=Path, help="also write every case's distances here")
    parser.add_argument("--gpus", action="store_true", help="on GPUs, one for each process")
    args = parser.parse_args()
    num_gpus = torch.cuda.device_count() if args.gpus else 0
    if args.gpus and not num_gpus:
        parser.error("--gpus: this machine has no CUDA device")
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        results = run_cases(chosen_cases(args), folder, 24 * 3600, num_gpus, args.large_steps)
    tolerances = GPU_TOLERANCES if num_gpus else TOLERANCES
    console = Console(width=140)
    console.print(table_of(results))
    console.print("allowed: " + ", ".join(f"{key} {value:g}" for key, value in tolerances.items()))
    problems = [result for result in results if result.problem]
    for result in problems:
        console.print(f"{result.case.name}: {result.problem}", style="red")
    console.print(f"{len(results)} cases, {len(problems)} beyond; {sum(r.seconds for r in results):.0f} s")
    if args.json:
        rows = [{"case": r.case.to_json(), "distance": r.distance, "problem": r.problem} for r in results]
        args.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
