"""Metrics from the logits and labels of all targets of a split, computed once for the whole split.

The same as scikit-learn and torchmetrics say, which a process would need seconds to import. A share of nothing is 0.
"""

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional

from dist_finetune.tasks.spans import count_spans


def classification_metrics(
    logits: Tensor, labels: Tensor, rows: Tensor | None = None, classes: Sequence[str] = ()
) -> dict[str, float]:
    """loss, accuracy and macro F1 (over the classes that occur or are predicted) of logits (N, C), labels (N,)."""
    right, called, true = class_counts(logits.argmax(1), labels, logits.shape[1])
    f1 = (2 * right / (called + true))[called + true > 0]
    return {
        "loss": functional.cross_entropy(logits.double(), labels).item(),
        "accuracy": (right.sum() / len(labels)).item(),
        "f1": f1.mean().item(),
    }


def multilabel_metrics(logits: Tensor, labels: Tensor, rows: Tensor, classes: Sequence[str]) -> dict[str, float]:
    """loss, micro F1, macro F1 (over the labels that occur or are predicted) and accuracy (rows with every label right)
    of logits and labels (N, C). A label is predicted from a probability of 0.5 up."""
    predicted, true = logits >= 0, labels > 0.5
    right = (predicted & true).sum(0).double()
    either = (predicted.sum(0) + true.sum(0)).double()
    f1 = (2 * right / either)[either > 0]
    return {
        "loss": functional.binary_cross_entropy_with_logits(logits.double(), labels.double()).item(),
        "f1": share(2 * right.sum().item(), either.sum().item()),
        "f1_macro": f1.mean().item() if len(f1) else 0.0,
        "accuracy": (predicted == true).all(1).double().mean().item(),
    }


def regression_metrics(logits: Tensor, labels: Tensor, rows: Tensor, classes: Sequence[str]) -> dict[str, float]:
    """loss and mse (both the mean squared error), mae, r2, and the correlations pearson and spearman, of predictions
    (N, 1) and labels (N,). Where all labels are equal, r2 and the correlations are 0."""
    values, true = logits.squeeze(1).double(), labels.double()
    squared = (values - true).square()
    mse, variance = squared.mean().item(), (true - true.mean()).square().mean().item()
    return {
        "loss": mse,
        "mse": mse,
        "mae": (values - true).abs().mean().item(),
        "r2": 1 - mse / variance if variance > 0 else 0.0,
        "pearson": _correlation(values, true),
        "spearman": _correlation(_ranks(values), _ranks(true)),
    }


def tagging_metrics(logits: Tensor, labels: Tensor, rows: Tensor, classes: Sequence[str]) -> dict[str, float]:
    """loss and accuracy of words, and micro precision, recall and F1 of entities, of logits (M, C), labels and row
    numbers (M,) of all labelled words in order."""
    predicted = logits.argmax(1)
    counts = count_spans(predicted.tolist(), labels.tolist(), rows.tolist(), classes).values()
    right, called, true = (sum(getattr(c, name) for c in counts) for name in ("right", "called", "true"))
    return {
        "loss": functional.cross_entropy(logits.double(), labels).item(),
        "accuracy": (predicted == labels).double().mean().item(),
        "precision": share(right, called),
        "recall": share(right, true),
        "f1": share(2 * right, called + true),
    }


def class_counts(predicted: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """How often each class is predicted rightly, predicted, and true: float64 (C,) each."""
    # Not by a table of (C, C): of ImageNet-21k that is 4 GB.
    found = (labels[labels == predicted], predicted, labels)
    right, called, true = (numbers.bincount(minlength=num_classes).double() for numbers in found)
    return right, called, true


def share(part: float, whole: float) -> float:
    """part / whole, 0 of nothing."""
    return part / whole if whole else 0.0


def _correlation(a: Tensor, b: Tensor) -> float:
    a, b = a - a.mean(), b - b.mean()
    norm = (a.square().sum() * b.square().sum()).sqrt().item()
    return share((a * b).sum().item(), norm)


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 1; equal values share the mean of theirs."""
    _, place, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[place]
