"""A linear head put into the model's own classifier, and the proof that the model then predicts what the head did."""

from dataclasses import dataclass

import torch
from torch import nn

from dist_finetune.engine.base import Inputs
from dist_finetune.engine.precision import bf16_of
from dist_finetune.errors import TrainingError
from dist_finetune.evaluate import to_device
from dist_finetune.features.depths import head_linear
from dist_finetune.features.extract import plan_shards
from dist_finetune.features.heads import HeadFit, LinearHead
from dist_finetune.features.job import FeatureJob
from dist_finetune.models.sources import forward_logits
from dist_finetune.models.structure import Structure
from dist_finetune.world import gather_objects, together

# A row whose two best scores are closer than this share of the largest score may fall to either side.
# Passes outside an engine are fp32 beside fp16.
TIE = {"fp32": 1e-5, "bf16": 3e-2, "fp16": 1e-5}


@dataclass(frozen=True)
class Agreement:
    """How many rows of a split the model with the head in it predicts as the head does on its features."""

    num_rows: int
    num_equal: int
    largest_difference: float
    """Of the logits."""


def fold_problem(structure: Structure, model: nn.Module, num_classes: int) -> str | None:
    """Why no linear head can be put into this model; None where it can."""
    path = head_linear(structure, model)
    if path is None:
        return "the model has no linear layer as its head"
    linear = model.get_submodule(path)
    assert isinstance(linear, nn.Linear)
    if linear.out_features != num_classes:
        return (
            f"the last linear layer of its head, {path}, gives {linear.out_features} values for {num_classes} classes"
        )
    if linear._parameters["bias"] is None:
        return f"{path} has no bias, which standardised features need"
    return None


def fold_head(structure: Structure, model: nn.Module, head: LinearHead) -> None:
    """Writes a head of the depth `head` into the model's last Linear, in place."""
    path = head_linear(structure, model)
    assert path is not None
    linear = model.get_submodule(path)
    assert isinstance(linear, nn.Linear)
    with torch.no_grad():
        linear.weight.copy_(torch.from_numpy(head.weight))
        linear.bias.copy_(torch.from_numpy(head.bias))


def verify_predictions(job: FeatureJob, model: nn.Module, fit: HeadFit, split: str) -> Agreement:
    """Runs a model that has the head `fit` over a split and compares its predictions with the head's own on stored
    features, row by row. Collective.

    Raises TrainingError where a row differs that is no tie: the model then computes more than its last layer shows.
    """
    found = gather_objects(together(lambda: _compare(job, model, fit, split)))
    return Agreement(
        sum(part.num_rows for part in found),
        sum(part.num_equal for part in found),
        max(part.largest_difference for part in found),
    )


def _compare(job: FeatureJob, model: nn.Module, fit: HeadFit, split: str) -> Agreement:
    rows, world = job.splits[split], job.world
    num_rows = num_equal = 0
    largest = 0.0
    for shard in plan_shards(rows, job.store.key.batch_size)[world.rank :: world.world_size]:
        _, features, _ = job.store.shard(split, shard.number, fit.depth)
        expected = torch.from_numpy(fit.scores(features))
        batches = (rows.collate([rows.dataset[int(i)] for i in ids]) for ids in shard.batches)
        given = torch.cat([_logits(job, model, batch["inputs"]) for batch in batches])
        best = expected.topk(2, dim=1).values
        is_tie = best[:, 0] - best[:, 1] <= TIE[job.plan.precision] * expected.abs().max()
        equal = given.argmax(dim=1) == expected.argmax(dim=1)
        if not (equal | is_tie).all():
            row = int(shard.ids[int((~(equal | is_tie)).nonzero()[0])])
            raise TrainingError(
                f"no model is written: with the {fit.kind} head of {fit.depth} on it, the network predicts another "
                f"class for row {row} of {split} than the head itself does, so its head is more than one linear layer"
            )
        num_rows, num_equal = num_rows + len(equal), num_equal + int(equal.sum())
        largest = max(largest, float((given - expected).abs().max()))
    return Agreement(num_rows, num_equal, largest)


def _logits(job: FeatureJob, model: nn.Module, inputs: Inputs) -> torch.Tensor:
    with torch.inference_mode(), bf16_of(job.plan):
        return forward_logits(model, to_device(inputs, job.world.device)).double().cpu()
