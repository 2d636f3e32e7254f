"""What training wrote down is what evaluate, predict and exports give afterwards, however the run was trained."""

import csv
import json
import sys
from pathlib import Path

import pytest
import torch
from harness import MATRIX, Matrix, Run, command, finish
from material import NUM_VALIDATION, Material
from safetensors.torch import load_file

from dist_finetune import load_spec, train
from dist_finetune.inference.evaluate import evaluate_run
from dist_finetune.inference.export import export_run
from dist_finetune.inference.predict import predict_file

pytestmark = pytest.mark.dist

FRESH = """
import csv, sys
import numpy as np, torch
from PIL import Image
from pathlib import Path
from safetensors.torch import save_file
from transformers import AutoImageProcessor, AutoModelForImageClassification, AutoModelForSequenceClassification
from transformers import AutoTokenizer

text, rows, image, images, out = sys.argv[1:]
texts = [row["text"] for row in csv.DictReader(open(rows, encoding="utf-8"))]
pictures = [Image.open(path).convert("RGB") for path in sorted(Path(images).rglob("*.png"))]
with torch.inference_mode():
    batch = AutoTokenizer.from_pretrained(text)(texts, padding=True, return_tensors="pt")
    found = {"text": AutoModelForSequenceClassification.from_pretrained(text).eval()(**batch).logits.clone()}
    pixels = AutoImageProcessor.from_pretrained(image)(pictures)["pixel_values"]
    pixels = torch.as_tensor(np.stack(list(pixels)))
    found["image"] = AutoModelForImageClassification.from_pretrained(image).eval()(pixels).logits.clone()
assert "dist_finetune" not in sys.modules
save_file(found, out)
"""


@pytest.mark.parametrize("kind", ["text", "image"])
@pytest.mark.parametrize("key", [f"{num_processes}-{strategy}" for num_processes, strategy in MATRIX])
def test_evaluate_gives_what_the_run_ended_with(matrix: Matrix, kind: str, key: str) -> None:
    run = getattr(matrix, kind)[key]
    found = evaluate_run(run.folder)
    stated = {name.removeprefix("eval/"): value for name, value in run.summary["metrics"].items()}
    assert found.metrics == pytest.approx(stated, rel=1e-5)
    assert found.step == run.summary["steps"]
    # Where training held the whole model as evaluate does, not a bit differs.
    tolerance = 0.0 if key.endswith("ddp") else 1e-5
    torch.testing.assert_close(found.evaluation.logits, run.predictions()["logits"], rtol=tolerance, atol=tolerance)
    assert torch.equal(found.evaluation.labels, run.predictions()["labels"])


@pytest.fixture(scope="module")
def special(material: Material, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Runs whose model is not simply the last one in fp32, in this process."""
    output = str(tmp_path_factory.mktemp("special"))
    wild = {"lr": 0.5, "schedule": "constant", "epochs": 3}
    head_only = {"at": ["head"], "heads": ["softmax"]}
    configs = {
        "best": material.text(checkpoint={"best": "eval/loss"}, train=wild),
        "bf16": material.text(train={"precision": "bf16", "epochs": 1}),
        "features": material.text(task="features", freeze="none", features=head_only),
        "cached": material.image(cache="on", train={"epochs": 2}),
    }
    return {
        name: Run(train(load_spec({**config, "output": output, "name": name})).folder, ())
        for name, config in configs.items()
    }


def test_evaluate_knows_the_best_step_the_precision_and_a_cached_prefix(special: dict[str, Run]) -> None:
    assert special["best"].summary["kept_step"] < special["best"].summary["steps"]
    for name in ("best", "bf16", "cached"):
        run = special[name]
        found = evaluate_run(run.folder)
        assert found.step == run.summary["kept_step"]
        assert found.precision == ("bf16" if name == "bf16" else "fp32")
        stated = {f"eval/{key}": value for key, value in found.metrics.items()}
        assert stated == pytest.approx(run.summary["metrics"], rel=1e-5), name


def test_evaluate_takes_a_head_that_was_fitted_on_features(special: dict[str, Run], material: Material) -> None:
    run = special["features"]
    found = evaluate_run(run.folder)
    assert found.metrics["accuracy"] == pytest.approx(run.summary["folded"]["accuracy"])
    assert 0.4 < found.metrics["accuracy"] < 1
    with material.validation.open(encoding="utf-8") as file:
        labels = [row["label"] for row in csv.DictReader(file)]
    right = [a.label == b for a, b in zip(predict_file(run.folder, material.validation), labels, strict=True)]
    assert sum(right) / len(right) == pytest.approx(found.metrics["accuracy"])


@pytest.mark.parametrize(("kind", "key"), [("text", "2-zero3"), ("image", "2-fsdp")])
def test_predictions_are_the_softmax_of_the_logits_that_the_run_saved(
    matrix: Matrix, material: Material, kind: str, key: str
) -> None:
    run = getattr(matrix, kind)[key]
    found = list(predict_file(run.folder, material.validation if kind == "text" else material.validation_images))
    saved = run.predictions()["logits"]
    given = torch.tensor([list(row.probabilities.values()) for row in found])
    torch.testing.assert_close(given, saved.softmax(1), rtol=1e-5, atol=1e-6)
    classes = ["food", "music", "weather"] if kind == "text" else ["blue", "green", "red"]
    assert [row.label for row in found] == [classes[i] for i in saved.argmax(1)]


def test_two_processes_evaluate_together(matrix: Matrix, tmp_path: Path) -> None:
    run = matrix.text["2-zero2"]
    done = command("evaluate", run.folder, "--json", folder=tmp_path, num_processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert (found["world_size"], found["num_rows"]) == (2, NUM_VALIDATION)
    assert {f"eval/{k}": v for k, v in found["metrics"].items()} == pytest.approx(run.summary["metrics"], rel=1e-5)


def test_exports_give_the_same_logits_in_a_fresh_interpreter(
    matrix: Matrix, material: Material, tmp_path: Path
) -> None:
    text, image = matrix.text["2-zero3"], matrix.image["2-fsdp"]
    folders = [str(export_run(run.folder, "hf", tmp_path / run.folder.name).folder) for run in (text, image)]
    out = tmp_path / "logits.safetensors"
    data = [str(material.validation), str(material.validation_images)]
    arguments = [folders[0], data[0], folders[1], data[1], str(out)]
    done = finish([sys.executable, "-c", FRESH, *arguments], 120, tmp_path, PYTHONPATH="")
    assert done.returncode == 0, done.stderr[-3000:]
    found = load_file(out)
    torch.testing.assert_close(found["text"], text.predictions()["logits"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["image"], image.predictions()["logits"], rtol=1e-4, atol=1e-4)
