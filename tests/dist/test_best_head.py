"""The best head of a feature run, whatever its depth and kind, is what predict, evaluate and ONNX give."""

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import Run, read_json, stored_features
from material import NUM_VALIDATION, NUM_VALIDATION_IMAGES, Material
from safetensors.torch import load_file

from dist_finetune import load_spec, train
from dist_finetune.errors import UserError
from dist_finetune.features.heads import make_head
from dist_finetune.inference.evaluate import evaluate_run
from dist_finetune.inference.export import export_run
from dist_finetune.inference.predict import predict_file
from dist_finetune.models.export import load_exported

pytestmark = pytest.mark.dist

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("text", {"at": ["0"], "heads": ["softmax"], "pool": "cls"}),
    "bf16": ("text", {"at": ["1"], "heads": ["svm"]}),
    "kernel": ("text", {"at": ["head"], "heads": ["softmax", "rbf-svm"]}),
    "map": ("image", {"at": ["0"], "heads": ["svm"], "pool": "pyramid"}),
}


@pytest.fixture(scope="module")
def headed(material: Material, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """A run of each case, in this process."""
    output = str(tmp_path_factory.mktemp("headed"))
    found = {}
    for name, (kind, features) in CASES.items():
        precision = {"train": {"eval_batch_size": 4, "precision": "bf16" if name == "bf16" else "fp32"}}
        config = getattr(material, kind)(task="features", freeze="none", features=features, **precision)
        found[name] = Run(train(load_spec({**config, "output": output, "name": name})).folder, ())
    return found


def features_of(run: Run, split: str, depth: str) -> tuple[np.ndarray, np.ndarray]:
    """float64 features and labels in dataset order."""
    features, labels = stored_features(Path(run.summary["features"]), split, depth)
    return features.astype(np.float64), labels


def scikit_learns(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """What scikit-learn's own pipeline predicts for the validation rows, and their labels."""
    best = run.summary["best"]
    head = make_head(best["head"], best["regularisation"], None, 0).fit(*features_of(run, "train", best["depth"]))
    unseen, labels = features_of(run, "validation", best["depth"])
    return head.predict(unseen), labels


@pytest.mark.parametrize("name", list(CASES))
def test_predict_and_evaluate_give_what_scikit_learns_best_head_predicts(
    headed: dict[str, Run], material: Material, name: str
) -> None:
    run = headed[name]
    expected, labels = scikit_learns(run)
    assert read_json(run.folder / "heads" / "best.json")["depth"] == run.summary["best"]["depth"]
    found = evaluate_run(run.folder)
    assert found.evaluation.logits.argmax(1).tolist() == expected.tolist()
    assert found.metrics["accuracy"] == pytest.approx(np.mean(expected == labels))
    assert found.metrics["accuracy"] == pytest.approx(run.summary["metrics"]["eval/accuracy"])
    assert str(found.head) in found.lines()
    is_text = CASES[name][0] == "text"
    rows = list(predict_file(run.folder, material.validation if is_text else material.validation_images))
    classes = read_json(run.folder / "plan.json")["classes"]
    assert [row.label for row in rows] == [classes[i] for i in expected]
    assert len(rows) == (NUM_VALIDATION if is_text else NUM_VALIDATION_IMAGES)
    assert run.summary["num_rows_predicted_alike"] == len(rows)


def test_the_network_under_a_best_head_is_as_its_library_loads_it(headed: dict[str, Run], material: Material) -> None:
    assert not (headed["linear"].folder / "model").exists()
    body, card, classes = load_exported(headed["linear"].folder / "heads" / "body")
    before = load_file(material.bert / "model.safetensors")
    assert card.source == "transformers"
    assert classes == ("food", "music", "weather")
    kept = {name.removeprefix("bert."): tensor for name, tensor in body.state_dict().items()}
    assert len(before) > 40
    assert all(torch.equal(kept[name], tensor) for name, tensor in before.items())


def test_of_equal_heads_the_models_own_last_layer_is_the_best(material: Material, tmp_path: Path) -> None:
    options = {"at": ["0", "head"], "heads": ["svm"]}
    config = material.image(task="features", freeze="none", features=options)
    summary = train(load_spec({**config, "output": str(tmp_path), "name": "tied"}))
    assert {result.cv_accuracy for result in summary.results} == {1.0}
    assert summary.best == summary.folded
    assert not (summary.folder / "heads" / "best.json").exists()


def test_what_can_leave_leaves_and_the_rest_says_why(headed: dict[str, Run], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"softmax at block 0, and transformers has no model .* --to onnx"):
        export_run(headed["linear"].folder, "hf")
    with pytest.raises(UserError, match=r"rbf-svm at .*, which scikit-learn computes"):
        export_run(headed["kernel"].folder, "onnx")
    made = export_run(headed["kernel"].folder, "hf", tmp_path / "out")
    assert "not the best head of the run, rbf-svm at" in made.notes[0]
    model, _, _ = load_exported(made.folder)
    assert model.classifier.out_features == 3


@pytest.mark.skipif(importlib.util.find_spec("onnxscript") is None, reason="onnxscript is not installed")
@pytest.mark.parametrize("name", ["linear", "map"])
def test_onnx_holds_the_best_head(headed: dict[str, Run], tmp_path: Path, name: str) -> None:
    made = export_run(headed[name].folder, "onnx", tmp_path / "onnx")
    assert made.notes[0].startswith("onnxruntime gives the model's logits")


@pytest.mark.parametrize(
    ("file", "name"), [("best.json", "linear"), ("linear.safetensors", "linear"), ("rbf-svm.skops", "kernel")]
)
def test_a_damaged_head_is_told(headed: dict[str, Run], tmp_path: Path, file: str, name: str) -> None:
    run = shutil.copytree(headed[name].folder, tmp_path / "run")
    (run / "heads" / file).write_bytes(b"{")
    with pytest.raises(UserError, match=f"{file}: can't be read"):
        evaluate_run(run)
