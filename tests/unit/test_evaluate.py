"""Metrics from logits, against torchmetrics."""

import pytest
import torch
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score

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
