"""Evaluation over all ranks: every sample exactly once, metrics from the gathered logits."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.data import DataLoader

from dist_finetune.data.loading import Rows
from dist_finetune.engine import Predictor
from dist_finetune.errors import TrainingError
from dist_finetune.world import World, gather_objects


@dataclass(frozen=True)
class Evaluation:
    """Logits (N, num_classes) and labels (N,) in dataset order, and the metrics that follow from them."""

    logits: torch.Tensor
    labels: torch.Tensor
    metrics: dict[str, float]


def evaluate(
    model: Predictor, rows: Rows, batch_size: int, world: World, between: Callable[[], object] = lambda: None
) -> Evaluation:
    """Runs the model over `rows`, each row on one rank, and returns the same result on every rank. Collective.

    Calls `between` before each batch, as often on every rank; it may raise to end the evaluation.
    """
    gathered = [part for part in gather_objects(predict_share(model, rows, batch_size, world, between)) if part]
    order, all_logits, all_labels = (torch.cat(parts) for parts in zip(*gathered, strict=True))
    if not torch.equal(order.sort().values, torch.arange(rows.num_rows)):
        raise TrainingError(f"evaluation saw {len(order)} rows instead of each of {rows.num_rows} once")
    back = order.argsort()
    all_logits, all_labels = all_logits[back], all_labels[back]
    return Evaluation(all_logits, all_labels, classification_metrics(all_logits, all_labels))


def predict_share(
    model: Predictor, rows: Rows, batch_size: int, world: World, between: Callable[[], object] = lambda: None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Numbers (M,), logits (M, num_classes) and labels (M,) of the rows that fall to this rank, in the order of its
    batches; None where there are none. All ranks run as many batches."""
    model.module.eval()
    batches = rows.evaluation_batches(batch_size, world)
    loader = DataLoader(rows.dataset, batch_sampler=[b.ids.tolist() for b in batches], collate_fn=rows.collate)
    logits, labels, ids = [], [], []
    for micro, batch in zip(batches, loader, strict=True):
        between()
        out = model.predict(to_device(batch["inputs"], world.device)).cpu()
        if not micro.is_filler:
            logits.append(out)
            labels.append(batch["labels"])
            ids.append(torch.from_numpy(micro.ids))
    return (torch.cat(ids), torch.cat(logits), torch.cat(labels)) if ids else None


def classification_metrics(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """loss, accuracy and macro F1 (over the classes that occur or are predicted) of logits (N, C), labels (N,).

    The same as torchmetrics says, which a process would need six seconds to import.
    """
    num_classes = logits.shape[1]
    predicted = logits.argmax(1)
    counts = torch.bincount(labels * num_classes + predicted, minlength=num_classes**2).view(num_classes, num_classes)
    right, either = counts.diagonal().double(), (counts.sum(0) + counts.sum(1)).double()
    f1 = (2 * right / either)[either > 0]
    return {
        "loss": nn.functional.cross_entropy(logits.double(), labels).item(),
        "accuracy": (right.sum() / len(labels)).item(),
        "f1": f1.mean().item(),
    }


def to_device(
    inputs: dict[str, torch.Tensor] | torch.Tensor, device: torch.device
) -> dict[str, torch.Tensor] | torch.Tensor:
    """A batch's inputs on `device`, copied without blocking the host where memory is pinned."""
    if isinstance(inputs, dict):
        return {name: tensor.to(device, non_blocking=True) for name, tensor in inputs.items()}
    return inputs.to(device, non_blocking=True)


def is_better(metrics: dict[str, float], best: dict[str, float] | None, key: str | None = None) -> bool:
    """True where the metric `key` (such as "eval/f1") is better; without a key, where accuracy rose, or stayed while
    the loss fell."""
    if best is None:
        return True
    if key:
        name = key.removeprefix("eval/")
        return metrics[name] < best[name] if name == "loss" else metrics[name] > best[name]
    return (metrics["accuracy"], -metrics["loss"]) > (best["accuracy"], -best["loss"])


def all_finite(values: Sequence[float]) -> bool:
    """True where no value is NaN or infinite."""
    return all(math.isfinite(v) for v in values)
