"""What a run leaves that must not depend on how it was run, and how far two such outcomes lie apart."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from dist_finetune.selfcheck import NO_GRADIENT

# Largest distances allowed. Relative, but for logits and weights, whose small values come from sums of large ones.
TOLERANCES = {
    "ids": 0.0, "lr": 0.0, "loss": 1e-5, "grad_norm": 5e-5, "logits": 1e-4, "predictions": 0.0, "metrics": 1e-4,
    "weights": 1e-4, "frozen": 0.0,
}  # fmt: skip
GPU_TOLERANCES = {**TOLERANCES, "loss": 1e-4, "grad_norm": 1e-3, "logits": 1e-3, "weights": 1e-3, "metrics": 1e-3}
"""A GPU's kernels add up in an order of their own for every batch size; TF32 is off."""


@dataclass(frozen=True)
class Outcome:
    """Numbers of a run by step, evaluations by step, and tensors: weight:NAME, frozen:NAME, logits."""

    ids: list[list[int]]
    lr: list[float]
    loss: list[float]
    grad_norm: list[float]
    metrics: list[list[float]]
    tensors: dict[str, torch.Tensor]

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        numbers = {k: getattr(self, k) for k in ("ids", "lr", "loss", "grad_norm", "metrics")}
        save_file(self.tensors, folder / "tensors.safetensors")
        (folder / "numbers.json").write_text(json.dumps(numbers), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "Outcome":
        numbers = json.loads((folder / "numbers.json").read_text(encoding="utf-8"))
        return cls(**numbers, tensors=load_file(folder / "tensors.safetensors"))


def read_outcome(run: Path, ids: list[list[int]], accumulation: int) -> Outcome:
    """The outcome of a finished run, whose steps took the samples `ids`, in `accumulation` micro-batches a rank."""
    batches = json.loads((run / "plan.json").read_text(encoding="utf-8"))["batches"]
    assert batches["gradient_accumulation_steps"] == accumulation, batches
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "train/loss" in line]
    assert len(ids) == len(steps), f"samples of {len(ids)} steps were noted, {len(steps)} were taken"
    evaluations = [line for line in lines if "eval/loss" in line]
    phases = json.loads((run / "freeze.json").read_text(encoding="utf-8"))["phases"].values()
    frozen = set.intersection(*({t["name"] for t in phase["tensors"] if t["frozen"]} for phase in phases))
    weights = load_file(run / "model" / "model.safetensors")
    tensors = {f"{'frozen' if name in frozen else 'weight'}:{name}": t.contiguous() for name, t in weights.items()}
    logits = load_file(run / "predictions" / "validation.safetensors")["logits"]
    return Outcome(
        ids,
        [line["train/lr"] for line in steps],
        [line["train/loss"] for line in steps],
        [line["train/grad_norm"] for line in steps],
        [[line["eval/loss"], line["eval/accuracy"], line["eval/f1"]] for line in evaluations],
        {**tensors, "logits": logits},
    )


def compare(outcome: Outcome, reference: Outcome) -> dict[str, float]:
    """How far an outcome is from a reference, by the keys of TOLERANCES; infinite where they can't be compared."""
    mine, theirs = outcome.tensors, reference.tensors
    if mine.keys() != theirs.keys() or len(outcome.loss) != len(reference.loss) or not outcome.loss:
        return dict.fromkeys(TOLERANCES, float("inf"))
    trained = [n for n in mine if n.startswith("weight:") and not n.endswith(NO_GRADIENT)]
    frozen = [n for n in mine if n.startswith("frozen:")]
    return {
        "ids": float(outcome.ids != reference.ids),
        "lr": float(outcome.lr != reference.lr),
        "loss": _relative(outcome.loss, reference.loss),
        "grad_norm": _relative(outcome.grad_norm, reference.grad_norm),
        "logits": (mine["logits"] - theirs["logits"]).abs().max().item(),
        "predictions": float((mine["logits"].argmax(1) != theirs["logits"].argmax(1)).sum()),
        "metrics": _largest(map(_relative, outcome.metrics, reference.metrics)),
        "weights": _largest((mine[n].double() - theirs[n].double()).abs().max().item() for n in trained),
        "frozen": float(sum(not torch.equal(mine[n], theirs[n]) for n in frozen)),
    }


def _relative(values: list[float], others: list[float]) -> float:
    if len(values) != len(others):
        return float("inf")
    return _largest(abs(a - b) / max(abs(b), 1e-12) if a != b else 0.0 for a, b in zip(values, others, strict=True))


def _largest(distances: Iterable[float]) -> float:
    """NaN where one is, which `max` may pass over."""
    return float(np.max(list(distances)))


def beyond(distance: dict[str, float], tolerances: Mapping[str, float] = TOLERANCES) -> dict[str, float]:
    """The distances that are not within tolerance; NaN never is."""
    return {key: value for key, value in distance.items() if not value <= tolerances[key]}
