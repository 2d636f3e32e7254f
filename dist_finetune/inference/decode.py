"""What a model's logits say of a row, for each task."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from dist_finetune.data.arrow import column_values
from dist_finetune.evaluate import Share
from dist_finetune.tasks.names import TaskName


@dataclass(frozen=True)
class Prediction:
    """The class that a row of the input has, and the probability of each class by name; they sum to 1."""

    id: Any
    label: str
    probabilities: dict[str, float]

    def cells(self) -> dict[str, Any]:
        """The columns of a .csv file."""
        return {"id": self.id, "label": self.label, **_named(self.probabilities)}


@dataclass(frozen=True)
class LabelsPrediction:
    """The labels of a row, those with a probability of 0.5 and more, and the probability of each label by name."""

    id: Any
    labels: tuple[str, ...]
    probabilities: dict[str, float]

    def cells(self) -> dict[str, Any]:
        """The columns of a .csv file; a bar separates labels."""
        return {"id": self.id, "labels": "|".join(self.labels), **_named(self.probabilities)}


@dataclass(frozen=True)
class ValuePrediction:
    """The number that a model predicts for a row."""

    id: Any
    value: float

    def cells(self) -> dict[str, Any]:
        """The columns of a .csv file."""
        return {"id": self.id, "value": self.value}


@dataclass(frozen=True)
class TagsPrediction:
    """The tag of each word of a row; None for a word behind data.max_length, or one that has no token."""

    id: Any
    words: tuple[str, ...]
    tags: tuple[str | None, ...]

    def cells(self) -> None:
        """A row has as many tags as words, which no .csv file holds."""


AnyPrediction = Prediction | LabelsPrediction | ValuePrediction | TagsPrediction


def decode(
    task: TaskName, share: Share, table: Dataset, ids: Sequence[Any], classes: tuple[str, ...]
) -> Iterator[AnyPrediction]:
    """A prediction for each row of an unlabelled table, in its order, from what a model gave for all of its rows."""
    return _DECODERS[task](share.in_order(), table, ids, classes)


def _classes(share: Share, table: Dataset, ids: Sequence[Any], classes: tuple[str, ...]) -> Iterator[AnyPrediction]:
    for row_id, row in zip(ids, share.logits.double().softmax(1).tolist(), strict=True):
        probabilities = dict(zip(classes, row, strict=True))
        yield Prediction(row_id, max(probabilities, key=probabilities.__getitem__), probabilities)


def _labels(share: Share, table: Dataset, ids: Sequence[Any], classes: tuple[str, ...]) -> Iterator[AnyPrediction]:
    for row_id, row in zip(ids, share.logits.double().sigmoid().tolist(), strict=True):
        probabilities = dict(zip(classes, row, strict=True))
        yield LabelsPrediction(row_id, tuple(n for n, p in probabilities.items() if p >= 0.5), probabilities)


def _values(share: Share, table: Dataset, ids: Sequence[Any], classes: tuple[str, ...]) -> Iterator[AnyPrediction]:
    for row_id, value in zip(ids, share.logits.squeeze(1).tolist(), strict=True):
        yield ValuePrediction(row_id, value)


def _tags(share: Share, table: Dataset, ids: Sequence[Any], classes: tuple[str, ...]) -> Iterator[AnyPrediction]:
    """The stand-in labels of the rows are the numbers of their words."""
    found: list[dict[int, str]] = [{} for _ in range(len(table))]
    tags = share.logits.argmax(1).tolist()
    for row, word, tag in zip(share.rows.tolist(), share.labels.tolist(), tags, strict=True):
        found[row][word] = classes[tag]
    for row_id, words, of_words in zip(ids, column_values(table, "words"), found, strict=True):
        yield TagsPrediction(row_id, tuple(words), tuple(of_words.get(i) for i in range(len(words))))


def _named(probabilities: dict[str, float]) -> dict[str, float]:
    return {f"p_{name}": value for name, value in probabilities.items()}


_DECODERS: dict[TaskName, Callable[[Share, Dataset, Sequence[Any], tuple[str, ...]], Iterator[AnyPrediction]]] = {
    "classification": _classes,
    "multilabel": _labels,
    "regression": _values,
    "token-classification": _tags,
}
