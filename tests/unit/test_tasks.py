"""Losses, metrics and entity spans of every task, against torch, scikit-learn and scipy."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn import metrics as sklearn
from torch.nn import functional

from dist_finetune.errors import UserError
from dist_finetune.tasks.metrics import multilabel_metrics, regression_metrics, tagging_metrics
from dist_finetune.tasks.names import METRICS, TASKS, is_better, require_classification, require_metric
from dist_finetune.tasks.spans import count_spans, has_spans
from dist_finetune.tasks.task import IGNORED_LABEL, counted, require_fitting_logits, task_of

ROWS = torch.arange(40)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_losses_are_sums_that_torch_gives_too() -> None:
    logits, classes = draw(5, 3), torch.tensor([0, 2, 1, 1, 0])
    found = task_of("classification").loss(logits, classes)
    assert torch.equal(found, functional.cross_entropy(logits, classes, reduction="sum"))
    labels = (draw(5, 3, seed=1) > 0).float()
    found = task_of("multilabel").loss(logits, labels)
    torch.testing.assert_close(found, 5 * functional.binary_cross_entropy_with_logits(logits, labels))
    values = draw(5, seed=2)
    found = task_of("regression").loss(logits[:, :1], values)
    torch.testing.assert_close(found, 5 * functional.mse_loss(logits[:, 0], values))


def test_the_loss_of_words_leaves_out_what_is_no_first_token() -> None:
    logits, labels = draw(2, 4, 3), torch.tensor([[-100, 0, -100, 2], [1, -100, -100, -100]])
    one_by_one = [
        functional.cross_entropy(logits[i, j], labels[i, j])
        for i, j in ((0, 1), (0, 3), (1, 0))
    ]  # fmt: skip
    task = task_of("token-classification")
    torch.testing.assert_close(task.loss(logits, labels), torch.stack(one_by_one).sum())
    assert task.loss(logits, torch.full_like(labels, IGNORED_LABEL)).item() == 0
    kept, true = counted(logits, labels)
    assert true.tolist() == [0, 2, 1]
    assert torch.equal(kept[1], logits[0, 3])
    assert counted(logits[0], true)[1] is true


@pytest.mark.parametrize("name", TASKS)
def test_blank_labels_fit_and_logits_of_another_shape_are_refused(name: str) -> None:
    logits = draw(2, 4, 3) if name == "token-classification" else draw(2, 1 if name == "regression" else 3)
    labels = task_of(name).blank(logits)
    assert torch.isfinite(task_of(name).loss(logits, labels))
    require_fitting_logits(logits, labels, name, logits.shape[-1])
    for wrong in (logits[..., None], logits[:1], logits.repeat_interleave(2, -1)):
        with pytest.raises(UserError, match=f"{name} with {logits.shape[-1]} outputs needs"):
            require_fitting_logits(wrong, labels, name, logits.shape[-1])


def test_multilabel_metrics_are_those_of_scikit_learn() -> None:
    logits, labels = draw(40, 5), (draw(40, 5, seed=3) > 0.4).float()
    predicted = (logits >= 0).numpy()
    found = multilabel_metrics(logits, labels, ROWS, "abcde")
    assert found.keys() == set(METRICS["multilabel"])
    assert found["f1"] == pytest.approx(sklearn.f1_score(labels, predicted, average="micro"))
    assert found["f1_macro"] == pytest.approx(sklearn.f1_score(labels, predicted, average="macro"))
    assert found["accuracy"] == pytest.approx(sklearn.accuracy_score(labels, predicted))
    by_label = [sklearn.log_loss(labels[:, i], logits[:, i].double().sigmoid(), labels=[0, 1]) for i in range(5)]
    assert found["loss"] == pytest.approx(np.mean(by_label), rel=1e-6)
    nothing = multilabel_metrics(torch.full((2, 3), -5.0), torch.zeros(2, 3), ROWS[:2], "abc")
    assert (nothing["f1"], nothing["f1_macro"], nothing["accuracy"]) == (0, 0, 1)


def test_regression_metrics_are_those_of_scikit_learn_and_scipy() -> None:
    values, labels = draw(40, 1), draw(40, seed=4).round(decimals=1)  # some labels are equal
    found = regression_metrics(values, labels, ROWS, ("score",))
    assert found.keys() == set(METRICS["regression"])
    values = values.squeeze(1).double()
    assert found["loss"] == found["mse"] == pytest.approx(sklearn.mean_squared_error(labels, values))
    assert found["mae"] == pytest.approx(sklearn.mean_absolute_error(labels, values))
    assert found["r2"] == pytest.approx(sklearn.r2_score(labels, values))
    assert found["pearson"] == pytest.approx(stats.pearsonr(labels, values).statistic)
    assert found["spearman"] == pytest.approx(stats.spearmanr(labels, values).statistic)
    for few in (1, 3):  # JSON has no NaN
        same = regression_metrics(draw(few, 1), torch.full((few,), 2.0), ROWS[:few], ("score",))
        assert all(math.isfinite(value) for value in same.values())
        assert (same["r2"], same["pearson"], same["spearman"]) == (0, 0, 0)


BIO = ("O", "B-person", "I-person", "B-place", "I-place")


def spans(tags: str, classes: tuple[str, ...] = BIO, rows: str = "") -> dict[str, int]:
    numbers = [classes.index(tag) for tag in tags.split()]
    sentence = [int(row) for row in rows.split()] or [0] * len(numbers)
    return {kind: counts.true for kind, counts in count_spans(numbers, numbers, sentence, classes).items()}


def test_spans_begin_and_end_as_conlleval_reads_them() -> None:
    assert spans("O B-person I-person O") == {"person": 1}
    assert spans("B-person B-person I-person") == {"person": 2}
    assert spans("B-person I-place I-place") == {"person": 1, "place": 1}
    assert spans("I-place O I-place") == {"place": 2}
    assert spans("B-place I-place I-place", rows="0 0 1") == {"place": 2}
    assert spans("O O") == {}
    bioes = ("O", "S-place", "B-place", "I-place", "E-place")
    assert spans("S-place S-place B-place I-place E-place S-place", bioes) == {"place": 4}
    assert spans("B-place E-place I-place E-place S-place E-place", bioes) == {"place": 4}
    assert spans("B-place L-place L-place U-place I-place", ("O", *(f"{p}-place" for p in "BILU"))) == {"place": 4}
    assert has_spans(BIO)
    assert not has_spans(("O", "NOUN", "B-place"))
    assert not has_spans(("O",))


def test_an_entity_is_right_where_both_ends_and_kind_are() -> None:
    true = ["B-person", "I-person", "O", "B-place", "O", "B-place", "I-place"]
    predicted = ["B-person", "O", "O", "B-place", "B-place", "B-place", "I-place"]
    numbers = [[BIO.index(tag) for tag in tags] for tags in (predicted, true)]
    logits, labels = functional.one_hot(torch.tensor(numbers[0]), 5).float(), torch.tensor(numbers[1])
    found = tagging_metrics(logits, labels, torch.tensor([0, 0, 0, 1, 1, 2, 2]), BIO)
    assert found.keys() == set(METRICS["token-classification"])
    assert (found["precision"], found["recall"]) == (2 / 4, 2 / 3)
    assert found["f1"] == pytest.approx(2 * (1 / 2) * (2 / 3) / (1 / 2 + 2 / 3))
    assert found["accuracy"] == pytest.approx(5 / 7)
    assert found["loss"] == pytest.approx(functional.cross_entropy(logits, labels).item())


def test_tags_without_prefixes_count_word_by_word() -> None:
    classes = ("O", "comma", "period")
    logits, labels = draw(40, 3), torch.randint(0, 3, (40,), generator=torch.Generator().manual_seed(5))
    found = tagging_metrics(logits, labels, ROWS // 7, classes)
    scores = sklearn.precision_recall_fscore_support(labels, logits.argmax(1), labels=[1, 2], average="micro")
    assert (found["precision"], found["recall"], found["f1"]) == pytest.approx(scores[:3])
    every = tagging_metrics(logits, labels, ROWS, ("noun", "verb", "other"))
    assert every["f1"] == pytest.approx(every["accuracy"])


def test_what_is_better_depends_on_the_task_or_the_named_metric() -> None:
    worse, better = {"r2": 0.1, "loss": 2.0, "mae": 1.0}, {"r2": 0.2, "loss": 1.0, "mae": 1.5}
    assert is_better(better, worse, "regression")
    assert not is_better(worse, better, "regression")
    assert not is_better(better, worse, "regression", "eval/mae")
    assert is_better(worse, better, "regression", "eval/mae")
    assert is_better({"f1": 0.5, "loss": 0.9}, {"f1": 0.5, "loss": 1.0}, "token-classification")
    assert is_better(worse, None, "regression")
    lost = {"r2": math.nan, "loss": math.nan, "mae": math.nan}
    for key in (None, "eval/mae"):
        assert is_better(worse, lost, "regression", key)
        assert not is_better(lost, worse, "regression", key)
        assert not is_better(lost, lost, "regression", key)
    assert is_better({"f1": 0.5, "loss": 1.0}, {"f1": 0.5, "loss": math.nan}, "token-classification")
    assert all("loss" in names for names in METRICS.values())


def test_metrics_and_tasks_that_do_not_go_together() -> None:
    require_metric("eval/mae", "regression")
    require_metric(None, "regression")
    with pytest.raises(UserError, match="eval/f1_macro is no metric of classification"):
        require_metric("eval/f1_macro", "classification")
    require_classification("classification", "advice", ("label",))
    with pytest.raises(UserError, match=r"advice works for classification only, and the data is one of regression"):
        require_classification("regression", "advice", ("score",))


def test_names_of_tasks_load_no_torch() -> None:
    code = "import sys, dist_finetune.tasks.names; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
