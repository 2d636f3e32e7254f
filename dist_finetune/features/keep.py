"""Which model a feature run leaves: its best head in the network's own classifier, or beside the network."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from dist_finetune.features.depths import HEAD
from dist_finetune.features.files import Found, best_of
from dist_finetune.features.fold import fold_head, fold_problem, verify_predictions
from dist_finetune.features.headed import BODY, HEADS, BestHead, HeadedModel, kernel_scores, linear_scores, write_best
from dist_finetune.features.heads import HeadFit
from dist_finetune.features.job import FeatureJob
from dist_finetune.features.results import HeadResult
from dist_finetune.models.export import export_model
from dist_finetune.world import on_first


@dataclass(frozen=True)
class Kept:
    """What was written, and the proof that it predicts what scikit-learn's heads do."""

    folded: HeadResult | None
    """The head inside model/."""
    note: str
    num_equal: int
    """Validation rows that the run's model and its best head were both run on, with equal predictions."""


def keep_models(job: FeatureJob, found: Sequence[Found]) -> Kept:
    """Writes model/ with the best linear head that fits the network's own classifier. Where another head is better,
    heads/best.json says which, and `predict` and `evaluate` run that one. Collective.

    Raises TrainingError where a model predicts other classes than its head does on the validation rows.
    """
    best, result = best_of(found)
    problem = fold_problem(job.plan.structure, job.model, job.num_classes)
    own = [pair for pair in found if pair[0].depth == HEAD and pair[0].linear is not None]
    if problem or not own:
        why = problem or "no linear head was fitted at the depth head"
        num_equal = _keep_beside(job, best, result)
        _export(job, job.folder / HEADS / BODY)
        return Kept(None, f"none: {why}; predict and evaluate run the {_named(best, result)}", num_equal)
    fit, folded = best_of(own)
    assert fit.linear is not None
    fold_head(job.plan.structure, job.model, fit.linear)
    num_equal = verify_predictions(job, job.model, fit, "validation").num_equal
    target = job.folder / "model"
    _export(job, target)
    note = f"{target}: the {fit.kind} head on what the model's own classifier reads, validation {folded.accuracy:.3f}"
    if fit is not best:
        num_equal = _keep_beside(job, best, result)
        note += f"; predict and evaluate run the {_named(best, result)}, which is no part of the model's own shape"
    return Kept(folded, note, num_equal)


def _keep_beside(job: FeatureJob, fit: HeadFit, result: HeadResult) -> int:
    """Proves and notes a head that is not the network's own last layer; returns the rows predicted alike."""
    depth = next(depth for depth in job.depths if depth.label == fit.depth)
    best = BestHead(
        fit.kind, fit.depth, depth.index, job.plan.spec.features.pool, fit.temperature, round(result.accuracy, 6)
    )
    if fit.linear is None:
        scores = kernel_scores(fit.estimator, fit.temperature)
    else:
        scores = linear_scores(torch.from_numpy(fit.linear.weight), torch.from_numpy(fit.linear.bias))
    model: nn.Module = HeadedModel(job.model, job.plan.structure, best, scores)
    num_equal = verify_predictions(job, model, fit, "validation").num_equal
    on_first(job.world, lambda: write_best(job.folder, best))
    return num_equal


def _export(job: FeatureJob, folder: Path) -> None:
    """The network as its own library loads it."""
    state = {name: tensor.detach().cpu() for name, tensor in job.model.state_dict().items()}
    plan = job.plan
    on_first(
        job.world,
        lambda: export_model(plan.card, plan.spec.model, plan.data.classes, state, folder, job.tokenizer),
    )


def _named(fit: HeadFit, result: HeadResult) -> str:
    return f"{fit.kind} head of {fit.depth} (validation {result.accuracy:.3f})"
