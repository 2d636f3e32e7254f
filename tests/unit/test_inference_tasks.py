"""Runs of multilabel, regression and token classification: measured, predicted with, exported, reported on, refused."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from material import NUM_TASK_VALIDATION, Material, write_material
from sklearn.metrics import precision_recall_fscore_support
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer

from dist_finetune import load_spec, make_plan, train
from dist_finetune.advise.run import advise
from dist_finetune.cli import main
from dist_finetune.errors import UserError
from dist_finetune.features.run import compare_heads
from dist_finetune.inference.evaluate import evaluate_run
from dist_finetune.inference.export import export_run
from dist_finetune.inference.predict import predict_file, save_predictions
from dist_finetune.tasks.names import METRICS

LABELS = {"tags": "token-classification", "topics": "multilabel", "score": "regression"}
MAX_LENGTH = 12  # some rows are longer


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return write_material(tmp_path_factory.mktemp("material"))


@pytest.fixture(scope="module")
def runs(material: Material) -> dict[str, Path]:
    """A short run of each task, in this process."""
    found = {}
    for label in LABELS:
        config = material.task(label, freeze="none", train={"epochs": 10, "lr": 3e-3})
        config["data"]["max_length"] = MAX_LENGTH
        spec = load_spec({**config, "output": str(material.folder / "runs"), "name": label})
        found[label] = train(spec).folder
    return found


def validation_rows(material: Material) -> list[dict[str, Any]]:
    lines = (material.folder / "tasks_validation.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def refused(work: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        work()
    return str(caught.value)


@pytest.mark.parametrize("label", LABELS)
def test_evaluate_gives_what_the_run_ended_with(runs: dict[str, Path], label: str) -> None:
    found = evaluate_run(runs[label])
    summary = json.loads((runs[label] / "summary.json").read_text(encoding="utf-8"))
    assert {f"eval/{name}": value for name, value in found.metrics.items()} == pytest.approx(
        summary["metrics"], rel=1e-6
    )
    assert (found.task, set(found.metrics)) == (LABELS[label], set(METRICS[found.task]))
    assert found.num_rows == NUM_TASK_VALIDATION
    assert all(name in found.lines() for name in found.metrics)
    again = json.loads((runs[label] / "evaluations.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert again["metrics"] == found.metrics
    if label == "score":
        assert (found.classes, found.calibration_error) == ((), None)
    if label == "tags":
        assert [score.name for score in found.classes] == ["food", "music", "weather"]
        assert 0 <= (found.calibration_error or 0) <= 1
    if label == "topics":
        true, called = found.evaluation.labels.numpy(), (found.evaluation.logits >= 0).numpy()
        precision, recall, _, counts = precision_recall_fscore_support(true, called, zero_division=0)
        assert [score.num_rows for score in found.classes] == counts.tolist()
        assert [score.precision for score in found.classes] == pytest.approx(precision.tolist())
        assert [score.recall for score in found.classes] == pytest.approx(recall.tolist())
        assert "label" in found.lines()


def test_predicted_tags_are_those_of_transformers_word_by_word(runs: dict[str, Path], material: Material) -> None:
    folder, rows = runs["tags"], validation_rows(material)
    model = AutoModelForTokenClassification.from_pretrained(folder / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    unlabelled = material.folder / "unlabelled.jsonl"
    unlabelled.write_text("".join(json.dumps({"words": row["words"]}) + "\n" for row in rows), encoding="utf-8")
    found = list(predict_file(folder, unlabelled))
    assert [prediction.id for prediction in found] == list(range(1, len(rows) + 1))
    num_unread, seen = 0, set()
    for row, prediction in zip(rows, found, strict=True):
        options = {"truncation": True, "max_length": MAX_LENGTH, "return_tensors": "pt"}
        batch = tokenizer(row["words"], is_split_into_words=True, **options)
        with torch.no_grad():
            tags = [model.config.id2label[i] for i in model(**batch).logits[0].argmax(1).tolist()]
        words = batch.word_ids()
        expected = [tags[words.index(i)] if i in words else None for i in range(len(row["words"]))]
        assert list(prediction.words) == row["words"]
        assert list(prediction.tags) == expected
        num_unread += expected.count(None)
        seen |= set(expected)
    assert num_unread > 0
    assert len(seen) > 2
    assert "write .jsonl" in refused(lambda: save_predictions(iter(found), material.folder / "tags.csv"))
    assert not (material.folder / "tags.csv").exists()


@pytest.mark.parametrize("label", ["topics", "score"])
def test_predicted_labels_and_numbers_are_those_of_transformers(
    runs: dict[str, Path], material: Material, label: str
) -> None:
    folder, rows = runs[label], validation_rows(material)
    model = AutoModelForSequenceClassification.from_pretrained(folder / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    found = list(predict_file(folder, material.folder / "tasks_validation.jsonl"))
    out = material.folder / f"{label}.csv"
    assert save_predictions(iter(found), out) == len(rows)
    with out.open(encoding="utf-8") as file:
        cells = list(csv.DictReader(file))
    for row, prediction, cell in zip(rows, found, cells, strict=True):
        batch = tokenizer(row["text"], truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
        with torch.no_grad():
            logits = model(**batch).logits[0]
        if label == "score":
            assert prediction.value == pytest.approx(logits.item(), rel=1e-4, abs=1e-5)
            assert float(cell["value"]) == prediction.value
        else:
            named = dict(zip(model.config.id2label.values(), logits.sigmoid().tolist(), strict=True))
            assert prediction.probabilities == pytest.approx(named, rel=1e-4)
            assert set(prediction.labels) == {name for name, p in named.items() if p >= 0.5}
            assert cell["labels"] == "|".join(prediction.labels)
            assert float(cell["p_food"]) == prediction.probabilities["food"]


@pytest.mark.parametrize("label", LABELS)
def test_exports_say_how_they_are_loaded(runs: dict[str, Path], label: str) -> None:
    kind = "TokenClassification" if label == "tags" else "SequenceClassification"
    assert f"AutoModelFor{kind}.from_pretrained" in export_run(runs[label], "hf").how_to_load


@pytest.mark.slow
@pytest.mark.parametrize("label", LABELS)
def test_onnx_gives_the_logits_of_the_model(runs: dict[str, Path], label: str) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="the onnx extra is absent")
    exported = export_run(runs[label], "onnx")
    assert "onnxruntime gives the model's logits" in exported.notes[0]
    described = json.loads((exported.folder / "model.json").read_text(encoding="utf-8"))
    assert described["task"] == LABELS[label]


@pytest.mark.parametrize("label", LABELS)
def test_the_page_leads_with_the_metric_of_the_task(runs: dict[str, Path], label: str) -> None:
    page = (runs[label] / "report.html").read_text(encoding="utf-8")
    summary = json.loads((runs[label] / "summary.json").read_text(encoding="utf-8"))
    name = METRICS[LABELS[label]][0]
    assert f"validation {name}" in page
    assert f'data-value="{summary["metrics"][f"eval/{name}"]}"' in page
    assert ("words by tag" in page) == (label == "tags")
    assert ("Validation errors" in page) == (label == "score")
    assert all(f"eval/{metric}" in page for metric in METRICS[LABELS[label]])


@pytest.mark.parametrize("label", LABELS)
def test_what_compares_classes_refuses_other_tasks(material: Material, label: str) -> None:
    config = {**material.task(label, freeze="none"), "output": str(material.folder / "refused"), "name": label}
    for work, what in ((compare_heads, "task: features"), (advise, "advice")):
        given = {**config, "task": "features"} if work is compare_heads else config
        message = refused(lambda work=work, given=given: work(load_spec(given)))
        assert f"{what} works for classification only, and the data is one of {LABELS[label]}" in message


def test_plans_of_other_tasks_and_metrics_that_they_lack(material: Material) -> None:
    plan = make_plan(load_spec({**material.task("tags", checkpoint={"best": "eval/recall"}), "name": "tags"}))
    assert (plan.data.task, len(plan.data.classes)) == ("token-classification", 7)
    assert plan.costs.activations is not None
    wrong = load_spec({**material.task("score", checkpoint={"best": "eval/accuracy"}), "name": "score"})
    assert "checkpoint.best: eval/accuracy is no metric of regression" in refused(lambda: make_plan(wrong))
    images = load_spec({**material.image(task="token-classification"), "name": "images"})
    assert "no column of words" in refused(lambda: make_plan(images))


def test_a_tagger_of_the_users_own(material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "user_models_tags.py").write_text(
        "from transformers import AutoConfig, BertForSequenceClassification, BertForTokenClassification\n"
        f"BERT = {str(material.bert)!r}\n"
        "def tagger(num_classes):\n"
        "    return BertForTokenClassification(AutoConfig.from_pretrained(BERT, num_labels=num_classes))\n"
        "def classifier(num_classes):\n"
        "    return BertForSequenceClassification(AutoConfig.from_pretrained(BERT, num_labels=num_classes))\n"
        "tagger.tokenizer = classifier.tokenizer = BERT\n"
    )
    monkeypatch.chdir(tmp_path)

    def run(name: str) -> Path:
        config = material.task("tags", model={"name": f"user_models_tags:{name}"}, train={"max_steps": 2})
        return train(load_spec({**config, "output": str(tmp_path), "name": name})).folder

    folder = run("tagger")
    found = evaluate_run(folder)
    stated = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["metrics"]
    assert found.metrics["loss"] == pytest.approx(stated["eval/loss"], rel=1e-6)
    message = refused(lambda: run("classifier"))
    assert (
        "the model gives logits of shape (2, 7); token-classification with 7 outputs needs (B, T, num_classes)"
        in message
    )


def test_the_command_says_the_task(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["evaluate", str(runs["tags"]), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["task"] == "token-classification"
    assert {score["name"] for score in found["classes"]} == {"food", "music", "weather"}
