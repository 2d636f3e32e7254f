"""Metrics from logits, against torchmetrics."""

import pytest
import torch
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score

from dist_finetune.evaluate import Evaluation
from dist_finetune.inference.scores import class_scores
from dist_finetune.tasks.metrics import classification_metrics


@pytest.mark.parametrize(("rows", "classes", "present"), [(50, 4, 4), (7, 5, 2), (1, 3, 1), (400, 20, 19)])
def test_metrics_are_those_of_torchmetrics(rows: int, classes: int, present: int) -> None:
    torch.manual_seed(rows)
    logits, labels = torch.randn(rows, classes), torch.randint(0, present, (rows,))
    found = classification_metrics(logits, labels)
    assert found["accuracy"] == pytest.approx(
        multiclass_accuracy(logits, labels, classes, average="micro").item(), abs=1e-6
    )
    assert found["f1"] == pytest.approx(multiclass_f1_score(logits, labels, classes, average="macro").item(), abs=1e-6)
    assert found["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), abs=1e-5)


def test_many_classes_take_memory_for_each_not_for_each_pair() -> None:
    """A table of all pairs would take 80 GB."""
    logits, labels = torch.zeros(3, 100_000), torch.tensor([7, 99_999, 7])
    logits[[0, 1, 2], [7, 99_999, 1]] = 1
    found = classification_metrics(logits, labels)
    assert (found["accuracy"], found["f1"]) == pytest.approx((2 / 3, (2 / 3 + 1 + 0) / 3))
    scores = class_scores(
        Evaluation(logits, labels, torch.arange(3), found), "classification", list(map(str, range(100_000)))
    )
    assert [(s.name, s.num_rows, s.precision, s.recall) for s in scores if s.num_rows] == [
        ("7", 2, 1.0, 0.5),
        ("99999", 1, 1.0, 1.0),
    ]
