"""What a feature run leaves in its folder."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dist_finetune.features.depths import HEAD
from dist_finetune.features.headed import BEST, HEADS, KERNEL, LINEAR
from dist_finetune.features.heads import HeadFit
from dist_finetune.features.job import FeatureJob
from dist_finetune.features.results import HeadResult, plot_results
from dist_finetune.run_folder import environment, read_summary, write_json
from dist_finetune.tensor_files import write_tensors

Found = tuple[HeadFit, HeadResult]


def best_of(found: Sequence[Found]) -> Found:
    """The best by cross-validation; of equals the one that can be a model's own last layer, then the first."""
    return max(found, key=lambda pair: (pair[1].cv_accuracy, pair[0].depth == HEAD and pair[0].linear is not None))


@dataclass(frozen=True)
class FeatureSummary:
    """The result of a feature run; the same on every rank, and summary.json in the run folder."""

    folder: Path
    status: str
    metrics: dict[str, float]
    best: HeadResult
    """By cross-validation on training rows, so that its validation accuracy is that of unseen rows."""
    folded: HeadResult | None
    """The linear head inside model/; None where there is no model/. Not always the best, see `keep`."""
    folded_note: str
    num_rows_predicted_alike: int
    """Validation rows that the run's model and its best head were both run on, with equal predictions."""
    results: tuple[HeadResult, ...]
    features: str
    """Folder of the extracted features."""
    extracted_rows: int
    samples_per_s: float
    total_s: float
    world_size: int

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {**dataclasses.asdict(self), "folder": str(self.folder)}


def write_start_files(job: FeatureJob) -> None:
    """plan.json and environment.json of a run whose settings all hold."""
    plan = job.plan
    content = {
        "task": "features",
        "model": plan.card.name,
        "card": dataclasses.asdict(plan.card),
        "data": dataclasses.asdict(plan.data),
        "topology": dataclasses.asdict(plan.topology),
        "batches": {"eval_batch_size": job.store.key.batch_size},
        "weights_sha256": job.provenance.sha256,
        "num_rows": plan.data.num_rows,
        "classes": list(plan.data.classes),
        "depths": [depth.label for depth in job.depths],
        "pool": plan.spec.features.pool,
        "precision": plan.precision,
        "batch_size": job.store.key.batch_size,
        "world_size": job.world.world_size,
        "features": str(job.store.folder),
    }
    write_json(job.folder / "plan.json", content)
    write_json(job.folder / "environment.json", environment())


def write_heads(job: FeatureJob, found: Sequence[Found], best: HeadResult) -> None:
    """heads/: every linear head as tensors, the best RBF SVM with skops; features.svg."""
    folder = job.folder / HEADS
    folder.mkdir(exist_ok=True)
    (folder / BEST).unlink(missing_ok=True)  # of an earlier, interrupted start
    tensors = {}
    for fit, _ in found:
        if fit.linear is not None:
            tensors[f"{fit.depth}/{fit.kind}/weight"] = torch.from_numpy(fit.linear.weight).contiguous()
            tensors[f"{fit.depth}/{fit.kind}/bias"] = torch.from_numpy(fit.linear.bias).contiguous()
    if tensors:
        write_tensors(tensors, folder / LINEAR)
    kernels = [pair for pair in found if pair[0].linear is None]
    if kernels:
        import skops.io

        fit, _ = best_of(kernels)
        skops.io.dump(fit.estimator, folder / KERNEL)
        write_json(
            folder / "rbf-svm.json",
            {"depth": fit.depth, "temperature": fit.temperature, "pool": job.plan.spec.features.pool},
        )
    title = f"{job.plan.card.name}, {job.splits['train'].num_rows:,} training rows; best {best.head} at {best.depth}"
    plot_results(
        [result for _, result in found], [depth.label for depth in job.depths], title, job.folder / "features.svg"
    )


def load_feature_summary(folder: Path) -> FeatureSummary:
    """The summary of a finished feature run, from its folder."""
    saved = read_summary(folder)
    values = {field.name: saved[field.name] for field in dataclasses.fields(FeatureSummary)}
    values["folder"] = folder
    values["best"] = HeadResult(**saved["best"])
    values["folded"] = HeadResult(**saved["folded"]) if saved["folded"] else None
    values["results"] = tuple(HeadResult(**result) for result in saved["results"])
    return FeatureSummary(**values)
