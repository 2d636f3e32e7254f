"""The tasks by name, their metrics, and which way each is better. Loads no torch."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from dist_finetune.errors import UserError, did_you_mean

TaskName = Literal["classification", "multilabel", "regression", "token-classification"]
TASKS: tuple[TaskName, ...] = get_args(TaskName)
METRICS: dict[TaskName, tuple[str, ...]] = {
    "classification": ("accuracy", "loss", "f1"),
    "multilabel": ("f1", "loss", "f1_macro", "accuracy"),
    "regression": ("r2", "loss", "mse", "mae", "pearson", "spearman"),
    "token-classification": ("f1", "loss", "accuracy", "precision", "recall"),
}
"""The first leads tables and pages, and says which evaluation is the best where the user names no metric."""
LOWER_IS_BETTER = ("loss", "mse", "mae")
SHARES = ("accuracy", "f1", "f1_macro", "precision", "recall")
"""Metrics that lie between 0 and 1."""
LOSS_UNITS: dict[TaskName, str] = {
    "classification": "loss a sample, nats",
    "multilabel": "loss a sample, nats",
    "regression": "squared error a sample",
    "token-classification": "loss a token, nats",
}


def is_better(
    metrics: Mapping[str, float], best: Mapping[str, float] | None, task: TaskName, key: str | None = None
) -> bool:
    """True where the metric `key` (such as "eval/f1") is better; without a key, where the task's first metric is, or
    stayed while the loss fell. NaN is worse than any number."""
    if best is None:
        return True
    names = (key.removeprefix("eval/"),) if key else (METRICS[task][0], "loss")
    return _score(metrics, names) > _score(best, names)


def _score(metrics: Mapping[str, float], names: Sequence[str]) -> tuple[float, ...]:
    signed = (-metrics[name] if name in LOWER_IS_BETTER else metrics[name] for name in names)
    return tuple(-math.inf if math.isnan(value) else value for value in signed)


def require_metric(key: str | None, task: TaskName) -> None:
    """Raises UserError where `checkpoint.best` names a metric that the task does not have."""
    valid = [f"eval/{name}" for name in METRICS[task]]
    if key is not None and key not in valid:
        raise UserError(
            f"checkpoint.best: {key} is no metric of {task}. {did_you_mean(key, valid)} It has: {', '.join(valid)}"
        )


def require_classification(task: TaskName, what: str, columns: Sequence[str]) -> None:
    """Raises UserError where `what`, which compares classes, is asked of data of another task."""
    if task != "classification":
        raise UserError(
            f"{what} works for classification only, and the data is one of {task} (data.label={','.join(columns)}); "
            "name a column of classes as data.label, or train with `dist-finetune run`"
        )


def inputs_in_words(modality: str | None, max_length: int | None, image_size: Sequence[int] | None) -> str:
    """How large a row is that a model is given, such as "up to 128 tokens" or "224 x 224 pixels"."""
    return f"up to {max_length} tokens" if modality == "text" else f"{' x '.join(map(str, image_size or ()))} pixels"


def outputs_in_words(task: TaskName, classes: Sequence[str]) -> str:
    """What a model gives for a row, such as "11 classes" or "a number, score"."""
    return {
        "classification": f"{len(classes)} classes",
        "multilabel": f"{len(classes)} labels, any number of them a row",
        "regression": f"a number, {', '.join(classes)}",
        "token-classification": f"{len(classes)} tags, one a word",
    }[task]
