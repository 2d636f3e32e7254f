"""How each class, label or kind of entity fares in an evaluation, and whether its confidence can be trusted."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from dist_finetune.evaluate import Evaluation
from dist_finetune.tasks.metrics import class_counts, share
from dist_finetune.tasks.names import TaskName
from dist_finetune.tasks.spans import count_spans


@dataclass(frozen=True)
class ClassScore:
    """How a class (a label, an entity) fares: how often it is true, how many of those that are called so are so, how
    many of it are found. A share of nothing is 0."""

    name: str
    num_rows: int
    precision: float
    recall: float


def class_scores(evaluation: Evaluation, task: TaskName, names: Sequence[str]) -> tuple[ClassScore, ...]:
    """A score for each class in the order of the logits, for each kind of entity by name; none for a regression."""
    if task == "classification":
        return _scores(names, class_counts(evaluation.logits.argmax(1), evaluation.labels, len(names)))
    if task == "multilabel":
        predicted, true = evaluation.logits >= 0, evaluation.labels > 0.5
        return _scores(names, [(predicted & true).sum(0), predicted.sum(0), true.sum(0)])
    if task == "token-classification":
        tags = evaluation.logits.argmax(1).tolist()
        found = count_spans(tags, evaluation.labels.tolist(), evaluation.rows.tolist(), names)
        return tuple(
            ClassScore(kind, c.true, share(c.right, c.called), share(c.right, c.true)) for kind, c in found.items()
        )
    return ()


def _scores(names: Sequence[str], counts: Sequence[Tensor]) -> tuple[ClassScore, ...]:
    """Of how often each is called so rightly, called so, and true."""
    rows = zip(names, *(count.tolist() for count in counts), strict=True)
    return tuple(ClassScore(n, int(true), share(right, called), share(right, true)) for n, right, called, true in rows)


def calibration_error(evaluation: Evaluation, task: TaskName) -> float | None:
    """Mean distance between the confidence of an answer and how often it is right, in 15 bins (Guo et al. 2017), where
    each row or word has one class; None for other tasks."""
    if task not in ("classification", "token-classification"):
        return None
    from torchmetrics.functional import classification

    logits, labels = evaluation.logits, evaluation.labels
    return float(classification.multiclass_calibration_error(logits.softmax(1), labels, logits.shape[1], n_bins=15))
