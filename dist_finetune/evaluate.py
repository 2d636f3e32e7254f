"""Evaluation over all ranks: every sample exactly once, metrics from the logits that the first rank gathers."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dist_finetune.data.batches import Ids
from dist_finetune.data.loading import Rows
from dist_finetune.engine import Predictor
from dist_finetune.errors import TrainingError
from dist_finetune.tasks.task import counted, task_of
from dist_finetune.world import World, gather_to_first, on_first


@dataclass(frozen=True)
class Evaluation:
    """Metrics, the same on every rank, and what they follow from: logits (M, C), labels (M,) or (M, C), and row numbers
    (M,) of all rows of a split, or of all labelled words, in dataset order. Those are on the first rank alone (M is 0
    elsewhere), as no other needs them in its memory."""

    logits: torch.Tensor
    labels: torch.Tensor
    rows: torch.Tensor
    metrics: dict[str, float]


@dataclass(frozen=True)
class Share:
    """Row numbers (M,), logits (M, C) and labels of the targets that fell to a rank, in the order of its batches."""

    rows: torch.Tensor
    logits: torch.Tensor
    labels: torch.Tensor

    def in_order(self) -> "Share":
        """By row; the words of a row stay as they are."""
        order = self.rows.argsort(stable=True)
        return Share(self.rows[order], self.logits[order], self.labels[order])


NOTHING = Share(torch.empty(0, dtype=torch.int64), torch.empty(0, 0), torch.empty(0))


def evaluate(
    model: Predictor, rows: Rows, batch_size: int, world: World, between: Callable[[], object] = lambda: None
) -> Evaluation:
    """Runs the model over `rows`, each row on one rank. Collective.

    Calls `between` before each batch, as often on every rank; it may raise to end the evaluation.
    """
    parts = [part for part in gather_to_first(predict_share(model, rows, batch_size, world, between)) if part]
    parts = parts or [NOTHING]
    whole = Share(*(torch.cat([getattr(part, name) for part in parts]) for name in ("rows", "logits", "labels")))
    whole = whole.in_order()
    return Evaluation(whole.logits, whole.labels, whole.rows, on_first(world, lambda: _metrics(whole, rows)))


def _metrics(whole: Share, rows: Rows) -> dict[str, float]:
    expected = _targets_of(rows, np.arange(rows.num_rows))
    if not torch.equal(whole.rows, expected):
        raise TrainingError(f"evaluation saw {len(whole.rows)} rows or words instead of each of {len(expected)} once")
    return task_of(rows.task).metrics(whole.logits, whole.labels, whole.rows, rows.classes)


def predict_share(
    model: Predictor, rows: Rows, batch_size: int, world: World, between: Callable[[], object] = lambda: None
) -> Share | None:
    """What the model gives for the rows that fall to this rank; None where there are none. All ranks run as many
    batches."""
    model.module.eval()
    batches = rows.evaluation_batches(batch_size, world)
    logits, labels, numbers = [], [], []
    for micro, batch in zip(batches, rows.batches_of([b.ids.tolist() for b in batches]), strict=True):
        between()
        out = model.predict(to_device(batch["inputs"], world.device)).cpu()
        if not micro.is_filler:
            out, true = counted(out, batch["labels"])
            logits.append(out)
            labels.append(true)
            numbers.append(_targets_of(rows, micro.ids))
    return Share(torch.cat(numbers), torch.cat(logits), torch.cat(labels)) if numbers else None


def _targets_of(rows: Rows, ids: Ids) -> torch.Tensor:
    """The row of each target of the rows `ids`."""
    return torch.from_numpy(ids if rows.num_targets is None else np.repeat(ids, rows.num_targets[ids]))


def to_device(
    inputs: dict[str, torch.Tensor] | torch.Tensor, device: torch.device
) -> dict[str, torch.Tensor] | torch.Tensor:
    """A batch's inputs on `device`, copied without blocking the host where memory is pinned."""
    if isinstance(inputs, dict):
        return {name: tensor.to(device, non_blocking=True) for name, tensor in inputs.items()}
    return inputs.to(device, non_blocking=True)


def all_finite(values: Sequence[float]) -> bool:
    """True where no value is NaN or infinite."""
    return all(math.isfinite(v) for v in values)
