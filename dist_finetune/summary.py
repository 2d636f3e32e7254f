"""What a run says about itself: plan.json, freeze.json, environment.json at the start, summary.json at the end."""

import dataclasses
import json
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dist_finetune.evaluate import Evaluation
from dist_finetune.models.card import Provenance
from dist_finetune.plan import Plan
from dist_finetune.proof import FrozenProof
from dist_finetune.run_folder import environment, read_summary, write_json
from dist_finetune.train import FitResult
from dist_finetune.world import World, gather_objects


@dataclass(frozen=True)
class Summary:
    """The result of a run; the same on every rank, and summary.json in the run folder."""

    folder: Path
    status: str
    metrics_before: dict[str, float]
    metrics: dict[str, float]
    num_frozen: int
    num_trainable: int
    frozen_verified: tuple[str, ...]
    steps: int
    stopped_early: bool
    train_s: float
    total_s: float
    peak_memory_gib: float
    world_size: int
    strategy: str
    planned_state_bytes: int
    wandb: str

    def to_json(self) -> dict[str, Any]:
        """JSON values, with the number of verified tensors beside their names."""
        out = dataclasses.asdict(self)
        out["folder"] = str(self.folder)
        out["num_frozen_tensors_verified"] = len(self.frozen_verified)
        return out


def write_start(folder: Path, plan: Plan, at_load: dict[str, str], provenance: Provenance) -> None:
    """plan.json, freeze.json and environment.json of a run that is about to train."""
    write_json(folder / "plan.json", plan.to_json())
    write_json(folder / "environment.json", environment())
    records = [
        dataclasses.asdict(record) | {"sha256": at_load.get(record.name)} for record in plan.manifest.records
    ]
    write_json(
        folder / "freeze.json",
        {"digest": plan.manifest.digest, "source": dataclasses.asdict(provenance), "tensors": records},
    )


def summarise(
    plan: Plan,
    folder: Path,
    before: dict[str, float],
    final: dict[str, Evaluation],
    fitted: FitResult,
    proof: FrozenProof,
    total_s: float,
    wandb_mode: str,
    world: World,
) -> Summary:
    """The summary of a finished run; rank 0 writes it. Collective (peak memory is the highest of all ranks)."""
    metrics = {
        f"{'eval' if split == 'validation' else split}/{name}": value
        for split, evaluation in final.items()
        for name, value in evaluation.metrics.items()
    }
    summary = Summary(
        folder=folder,
        status="finished",
        metrics_before={f"eval/{name}": value for name, value in before.items()},
        metrics=metrics,
        num_frozen=plan.manifest.num_frozen,
        num_trainable=plan.manifest.num_trainable,
        frozen_verified=proof.verified,
        steps=fitted.steps,
        stopped_early=fitted.stopped_early,
        train_s=round(fitted.train_s, 3),
        total_s=round(total_s, 3),
        peak_memory_gib=round(max(gather_objects(peak_memory_gib(world.device))), 3),
        world_size=world.world_size,
        strategy=plan.strategy,
        planned_state_bytes=plan.memory[plan.strategy].total,
        wandb=wandb_mode,
    )
    if world.is_first:
        write_json(folder / "summary.json", summary.to_json())
    return summary


def write_failure(folder: Path, error: Exception, world: World) -> None:
    """Marks a run that had started as failed, with the error's text. Leaves a folder of another run alone."""
    if world.is_first and (folder / "plan.json").exists() and read_summary(folder).get("status") is None:
        failure = {"status": "failed", "error": f"{type(error).__name__}: {error}", "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        write_json(folder / "summary.json", failure)


def load_summary(folder: Path) -> Summary:
    """The summary of a finished run, from its folder."""
    saved = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    values = {field.name: saved[field.name] for field in dataclasses.fields(Summary)}
    values |= {"folder": folder, "frozen_verified": tuple(saved["frozen_verified"])}
    return Summary(**values)


def peak_memory_gib(device: torch.device) -> float:
    """Most memory that this rank held so far: allocated on its GPU, or resident in its process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
