"""model/ of a run, in a fresh interpreter without this package: whole, and with the logits that evaluation saw."""

import sys
from pathlib import Path

import pytest
import torch
from harness import MATRIX, Matrix, finish, read_json
from material import NUM_VALIDATION, NUM_VALIDATION_IMAGES, Material
from safetensors.torch import load_file

pytestmark = pytest.mark.dist

KEYS = [f"{num_processes}-{strategy}" for num_processes, strategy in MATRIX]

TEXT = """
import csv, json, sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

rows, out, *folders = sys.argv[1:]
texts = [row["text"] for row in csv.DictReader(open(rows, encoding="utf-8"))]
logits, keys = {}, {}
for folder in folders:
    model, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    batch = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        logits[folder] = model.eval()(**batch).logits.clone()
    keys[folder] = {"state": list(model.state_dict()), "classes": list(model.config.id2label.values())}
assert "dist_finetune" not in sys.modules
save_file(logits, out)
print(json.dumps(keys))
"""

IMAGE = """
import json, sys
import timm, timm.data, torch
from safetensors.torch import save_file
from torchvision.datasets import ImageFolder

rows, out, *folders = sys.argv[1:]
logits, keys = {}, {}
for folder in folders:
    model = timm.create_model("local-dir:" + folder, pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
    images = torch.stack([image for image, _ in ImageFolder(rows, transform)])
    assert images.shape[-1] == 32, images.shape
    with torch.inference_mode():
        logits[folder] = model(images).clone()
    keys[folder] = {"state": list(model.state_dict()), "classes": model.pretrained_cfg["label_names"]}
assert "dist_finetune" not in sys.modules
save_file(logits, out)
print(json.dumps(keys))
"""


@pytest.fixture(scope="module")
def reloaded(matrix: Matrix, material: Material, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """By kind: logits and keys that a fresh interpreter finds, by folder of the model."""
    folder, found = tmp_path_factory.mktemp("fresh"), {}
    for kind, code, rows in (("text", TEXT, material.validation), ("image", IMAGE, material.validation_images)):
        out = folder / f"{kind}.safetensors"
        models = [str(run.folder / "model") for run in getattr(matrix, kind).values()]
        done = finish([sys.executable, "-c", code, str(rows), str(out), *models], 300, folder, PYTHONPATH="")
        assert done.returncode == 0, done.stderr[-4000:]
        (folder / f"{kind}.json").write_text(done.stdout.splitlines()[-1])
        found[kind] = {"logits": load_file(out), "keys": read_json(folder / f"{kind}.json")}
    return found


@pytest.mark.parametrize("kind", ["text", "image"])
@pytest.mark.parametrize("key", KEYS)
def test_the_librarys_own_loader_gives_the_logits_that_evaluation_saw(
    matrix: Matrix, reloaded: dict[str, dict], kind: str, key: str
) -> None:
    run = getattr(matrix, kind)[key]
    seen, again = run.predictions()["logits"], reloaded[kind]["logits"][str(run.folder / "model")]
    assert seen.shape == ((NUM_VALIDATION, 3) if kind == "text" else (NUM_VALIDATION_IMAGES, 3))
    assert seen.std(0).min() > 1e-3  # rows differ, so that their order is compared too
    torch.testing.assert_close(again, seen, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["text", "image"])
def test_every_strategy_writes_every_tensor(matrix: Matrix, reloaded: dict[str, dict], kind: str) -> None:
    for key, run in getattr(matrix, kind).items():
        found = reloaded[kind]["keys"][str(run.folder / "model")]
        assert sorted(found["state"]) == sorted(run.weights()), key
        assert all(tensor.dtype in (torch.float32, torch.int64) for tensor in run.weights().values())
        classes = ["food", "music", "weather"] if kind == "text" else ["blue", "green", "red"]
        assert found["classes"] == classes


def test_nothing_in_a_run_folder_is_pickled(matrix: Matrix) -> None:
    for run in matrix.all.values():
        files = [path for path in run.folder.rglob("*") if path.is_file()]
        assert len(files) > 8
        assert not [path for path in files if path.suffix in {".bin", ".pt", ".pth", ".pkl", ".ckpt"}]
        assert not [path for path in files if _is_pickle(path)]


def _is_pickle(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
