"""The tasks as a training loop sees them: losses that are sums over targets, metrics, and the labels of a batch.

A target is what a loss counts: a row, or a labelled word. Dividing sums by the number of targets of the whole global
batch gives the same step however the batch is spread.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from dist_finetune.errors import UserError
from dist_finetune.tasks.metrics import (
    classification_metrics,
    multilabel_metrics,
    regression_metrics,
    tagging_metrics,
)
from dist_finetune.tasks.names import TaskName

IGNORED_LABEL = -100
"""Of tokens that don't count: padding, special tokens, and all of a word but its first piece."""


@dataclass(frozen=True)
class Task:
    """One task. Logits are (B, C), those of words (B, T, C)."""

    loss: Callable[[Tensor, Tensor], Tensor]
    """The sum over the targets of a batch of fp32 logits and labels."""
    metrics: Callable[[Tensor, Tensor, Tensor, Sequence[str]], dict[str, float]]
    """Of logits (M, C), labels and row numbers (M,) of all targets of a split, and the names of the C outputs."""
    blank: Callable[[Tensor], Tensor]
    """Some labels that fit these logits."""
    labels: str
    """Shape of a batch's labels, in words."""


def task_of(name: TaskName) -> Task:
    """The task of this name."""
    return _TASKS[name]


def counted(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The logits (M, C) and labels (M,) of a batch that count: those of labelled words, in order, or all rows."""
    if logits.dim() < 3:
        return logits, labels
    is_counted = labels != IGNORED_LABEL
    return logits[is_counted], labels[is_counted]


def require_fitting_logits(logits: Tensor, labels: Tensor, name: TaskName, num_outputs: int) -> None:
    """Raises UserError where a model's logits have another shape than the task's labels ask for."""
    wanted = tuple(task_of(name).blank(logits).shape)
    if logits.shape[-1] != num_outputs or wanted != tuple(labels.shape):
        raise UserError(
            f"the model gives logits of shape {tuple(logits.shape)}; {name} with {num_outputs} outputs needs "
            f"{task_of(name).labels}"
        )


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(
        logits.flatten(0, -2), labels.flatten(), reduction="sum", ignore_index=IGNORED_LABEL
    )


def _binary_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(1).sum()


def _squared_error(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.squeeze(1) - labels).square().sum()


def _first_class(logits: Tensor) -> Tensor:
    return torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)


_TASKS: dict[TaskName, Task] = {
    "classification": Task(_cross_entropy, classification_metrics, _first_class, "(B, num_classes)"),
    "multilabel": Task(_binary_cross_entropy, multilabel_metrics, torch.zeros_like, "(B, num_classes)"),
    "regression": Task(_squared_error, regression_metrics, lambda logits: torch.zeros_like(logits[..., 0]), "(B, 1)"),
    "token-classification": Task(_cross_entropy, tagging_metrics, _first_class, "(B, T, num_classes)"),
}
