"""What a run is good for afterwards: right numbers on labelled rows, predictions in order, exports that load."""

import csv
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import timm
import torch
from material import NUM_VALIDATION, NUM_VALIDATION_IMAGES, Material, write_material, write_sentences
from PIL import Image
from sklearn.metrics import accuracy_score, f1_score, log_loss, precision_score, recall_score
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from dist_finetune.cli import main
from dist_finetune.data.images import evaluation_pixels, normalised
from dist_finetune.data.tables import read_tables
from dist_finetune.errors import UserError
from dist_finetune.hold import Hold
from dist_finetune.inference import predict
from dist_finetune.inference.evaluate import evaluate_run
from dist_finetune.inference.export import export_run
from dist_finetune.inference.predict import predict_file
from dist_finetune.inference.saved_run import open_run
from dist_finetune.models.export import export_model
from dist_finetune.models.load import load_model
from dist_finetune.models.sources import load_tokenizer
from dist_finetune.plan import plan_run
from dist_finetune.run_folder import folder_of, start_run_folder, write_json
from dist_finetune.spec_file import load_spec
from dist_finetune.topology import local_topology

TEXT_CLASSES = ["food", "music", "weather"]


def write_run(config: dict[str, Any], output: Path, name: str) -> Path:
    """The folder that a run of `config` leaves, with a head that was never trained."""
    spec = load_spec({**config, "output": str(output), "name": name})
    plan = plan_run(spec, local_topology(), read_tables(spec.data, spec.train.seed))
    model, _ = load_model(plan.card, spec.model, plan.data.classes, spec.train.seed)
    with torch.no_grad():
        for parameter in list(model.parameters())[-2:]:
            parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    folder = start_run_folder(spec, fresh=False, step=0, evaluated=True, hold=Hold(folder_of(spec)))
    write_json(folder / "plan.json", plan.to_json())
    tokenizer = load_tokenizer(plan.card) if plan.card.modality == "text" else None
    export_model(plan.card, spec.model, plan.data.classes, model.state_dict(), folder / "model", tokenizer)
    return folder


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return write_material(tmp_path_factory.mktemp("material"))


@pytest.fixture(scope="module")
def text_run(material: Material) -> Path:
    # Shorter than the longest sentence, so that cutting counts.
    return write_run(material.text(data={"max_length": 12}), material.folder / "runs", "text")


@pytest.fixture(scope="module")
def image_run(material: Material) -> Path:
    return write_run(material.image(), material.folder / "runs", "image")


def validation_texts(material: Material) -> tuple[list[str], list[str]]:
    with material.validation.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [row["text"] for row in rows], [row["label"] for row in rows]


def plain_text_logits(run: Path, texts: list[str]) -> torch.Tensor:
    """As a user of transformers gets them, one text at a time."""
    model = AutoModelForSequenceClassification.from_pretrained(run / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    with torch.no_grad():
        rows = [model(**tokenizer(t, truncation=True, max_length=12, return_tensors="pt")).logits[0] for t in texts]
    return torch.stack(rows)


def image_paths(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*.png"))


def plain_image_logits(run: Path, paths: list[str]) -> torch.Tensor:
    """As a user of timm gets them."""
    model = timm.create_model(f"local-dir:{run / 'model'}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
    with torch.no_grad():
        return model(torch.stack([transform(Image.open(path)) for path in paths]))


def refused(work: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        work()
    return str(caught.value)


def ended(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in arguments])
    shown = capsys.readouterr()
    return int(end.value.code or 0), shown.out, shown.err


def test_evaluate_gives_the_metrics_that_other_libraries_compute(
    text_run: Path, material: Material, capsys: pytest.CaptureFixture[str]
) -> None:
    texts, labels = validation_texts(material)
    logits = plain_text_logits(text_run, texts)
    truth = [TEXT_CLASSES.index(label) for label in labels]
    best = logits.argmax(1).numpy()
    expected = {
        "loss": log_loss(truth, logits.double().softmax(1).numpy()),
        "accuracy": accuracy_score(truth, best),
        "f1": f1_score(truth, best, average="macro"),
    }
    assert len(set(best.tolist())) > 1
    assert 0 < expected["accuracy"] < 1
    found = evaluate_run(text_run)
    assert found.metrics == pytest.approx(expected, rel=1e-5)
    right = {"zero_division": 0.0, "average": None, "labels": range(len(TEXT_CLASSES))}
    assert [c.name for c in found.classes] == TEXT_CLASSES
    assert [c.num_rows for c in found.classes] == [truth.count(i) for i in range(len(TEXT_CLASSES))]
    assert [c.precision for c in found.classes] == pytest.approx(precision_score(truth, best, **right))
    assert [c.recall for c in found.classes] == pytest.approx(recall_score(truth, best, **right))
    assert (found.data, found.num_rows) == ("validation", NUM_VALIDATION)
    torch.testing.assert_close(found.evaluation.logits, logits, rtol=1e-5, atol=1e-5)
    code, out, _ = ended(capsys, "evaluate", text_run, material.validation, "--json")
    assert (code, json.loads(out)["metrics"]) == (0, found.metrics)
    confidence, answers = logits.softmax(1).max(1)
    hits = answers == torch.tensor(truth)
    bins = (confidence * 15).ceil()
    gaps = [(hits[bins == b].float() - confidence[bins == b]).sum().abs() for b in bins.unique()]
    assert json.loads(out)["calibration_error"] == pytest.approx(sum(gaps).item() / len(truth), abs=1e-5)
    written = [json.loads(line) for line in (text_run / "evaluations.jsonl").read_text().splitlines()][-2:]
    assert [(row["data"], row["metrics"]) for row in written] == [
        ("validation", found.metrics),
        (str(material.validation), found.metrics),
    ]


def test_a_result_that_can_not_be_recorded_is_printed_all_the_same(
    text_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(text_run, run)
    (run / "evaluations.jsonl").unlink(missing_ok=True)
    (run / "evaluations.jsonl").mkdir()  # permissions would not stop root
    code, out, err = ended(capsys, "evaluate", run, "--json")
    assert (code, json.loads(out)["num_rows"]) == (0, NUM_VALIDATION)
    assert "warning: " in err
    assert "evaluations.jsonl: can't be written: Is a directory; the result was not recorded" in err


def test_evaluate_finds_the_rows_that_a_fraction_held_out(material: Material, tmp_path: Path) -> None:
    train = tmp_path / "train.csv"
    write_sentences(train, 80, seed=5)
    config = material.text(data={"train": str(train), "validation": 0.25, "max_rows": 30, "max_length": 12})
    run = write_run(config, tmp_path, "r")
    held = read_tables(load_spec(run / "config.yaml").data, 0).validation["text"]
    found = evaluate_run(run)
    assert found.num_rows == len(held) < 30
    torch.testing.assert_close(found.evaluation.logits, plain_text_logits(run, list(held)), rtol=1e-5, atol=1e-5)
    write_sentences(train, 80, seed=6)
    assert "they have changed since" in refused(lambda: evaluate_run(run))


def test_evaluate_takes_the_test_rows_first(material: Material, tmp_path: Path) -> None:
    run = write_run(material.image(data={"test": str(material.images)}), tmp_path, "r")
    assert evaluate_run(run).num_rows == 44
    found = evaluate_run(run, split="validation")
    assert (found.data, found.num_rows) == ("validation", NUM_VALIDATION_IMAGES)
    logits = plain_image_logits(run, image_paths(material.validation_images))
    torch.testing.assert_close(found.evaluation.logits, logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            "text,label\na,food\nb,fod\n",
            ["classes that the training rows lack: 'fod' (first at", "row 2)", "food, music"],
        ),
        ("text,labl\na,food\n", ["lacks the column 'label'", "Did you mean labl?"]),
        ("text,label\na,food\n,music\n", ["empty text (column 'text')", "row 2"]),
    ],
)
def test_rows_that_do_not_fit_the_run_are_refused(
    text_run: Path, tmp_path: Path, content: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.csv").write_text(content)
    code, out, err = ended(capsys, "evaluate", text_run, tmp_path / "rows.csv")
    assert (code, out) == (2, "")
    assert err.startswith("error: DATA: ")
    assert [word for word in words if word not in err] == [], err


def test_what_can_not_be_evaluated_says_so(text_run: Path, material: Material, tmp_path: Path) -> None:
    assert "has no data.test" in refused(lambda: evaluate_run(text_run, split="test"))
    assert "leave one out" in refused(lambda: evaluate_run(text_run, "builtin:topics", "test"))
    (tmp_path / "zzz.txt").touch()
    assert refused(lambda: evaluate_run(text_run, str(tmp_path / "absent.csv"))) == (
        f"DATA: {tmp_path / 'absent.csv'} does not exist (looked in {tmp_path})."
    )
    assert f"Write {text_run}." in refused(lambda: evaluate_run(text_run / "model"))
    summary = text_run / "summary.json"
    summary.write_text("{ half")
    assert f"{summary}: can't be read" in refused(lambda: evaluate_run(text_run))
    summary.unlink()


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_predictions_are_those_of_evaluate_in_the_order_of_the_file(
    text_run: Path, material: Material, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(predict.PIECE_ROWS, "text", 10)
    texts, _ = validation_texts(material)
    file = tmp_path / f"rows{suffix}"
    if suffix == ".csv":
        file.write_text("text\n" + "\n".join(texts))
    elif suffix == ".jsonl":
        file.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    else:
        pyarrow.parquet.write_table(pa.table({"text": texts}), file)
    found = list(predict_file(text_run, file))
    logits = evaluate_run(text_run).evaluation.logits
    assert [row.id for row in found] == list(range(1, NUM_VALIDATION + 1))
    given = torch.tensor([[row.probabilities[name] for name in TEXT_CLASSES] for row in found])
    torch.testing.assert_close(given, logits.softmax(1), rtol=1e-5, atol=1e-6)
    assert [row.label for row in found] == [TEXT_CLASSES[i] for i in logits.argmax(1)]


def test_predictions_come_while_the_file_is_read(
    text_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The third piece has a row without text: what lies before has been predicted, and a file is not left half."""
    monkeypatch.setitem(predict.PIECE_ROWS, "text", 10)
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"text": "" if row == 25 else f"rain {row}"}) for row in range(1, 31)))
    found = predict_file(text_run, file)
    seen = [next(found) for _ in range(20)]
    message = refused(lambda: next(found))
    assert [row.id for row in seen] == list(range(1, 21))
    assert f"empty text (column 'text'): {file} row 25" in message
    code, _, err = ended(capsys, "predict", text_run, file, "--to", tmp_path / "out.jsonl")
    assert (code, [path.name for path in tmp_path.iterdir()]) == (2, ["rows.jsonl"]), err
    content = '{"text": "rain"}\n'
    file.write_text(content)
    code, _, err = ended(capsys, "predict", text_run, file, "--to", tmp_path / "." / "rows.jsonl")
    assert (code, file.read_text()) == (2, content), "the rows are not replaced by what was made of them"
    assert "that is FILE itself" in err


def test_pairs_and_ids_and_files_without_a_header(
    material: Material, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts, labels = validation_texts(material)
    pairs = list(zip(texts, reversed(texts), labels, strict=True))
    rows = tmp_path / "train.csv"
    with rows.open("w", newline="") as file:
        csv.writer(file).writerows(pairs)
    names = ["first", "second", "label"]
    data = {"train": str(rows), "validation": str(rows), "columns": names, "text": names[:2], "label": "label"}
    run = write_run(material.text(data=data), tmp_path, "r")
    logits = evaluate_run(run).evaluation.logits
    other = tmp_path / "other.tsv"
    other.write_text("\n".join(f"n{i}\t{second}\t{first}" for i, (first, second, _) in enumerate(pairs)))
    arguments = ["--columns", "key,second,first", "--id", "key", "--to", tmp_path / "out.csv"]
    code, out, _ = ended(capsys, "predict", run, other, *arguments)
    assert (code, out) == (0, f"{NUM_VALIDATION} predictions in {tmp_path / 'out.csv'}\n")
    with (tmp_path / "out.csv").open() as file:
        found = list(csv.DictReader(file))
    assert [row["id"] for row in found] == [f"n{i}" for i in range(NUM_VALIDATION)]
    given = np.array([[float(row[f"p_{name}"]) for name in TEXT_CLASSES] for row in found])
    np.testing.assert_allclose(given, logits.softmax(1).numpy(), rtol=1e-4, atol=1e-6)
    plain = AutoTokenizer.from_pretrained(run / "model")(texts[:1], texts[-1:], return_tensors="pt")
    model = AutoModelForSequenceClassification.from_pretrained(run / "model").eval()
    torch.testing.assert_close(model(**plain).logits.detach(), logits[:1], rtol=1e-4, atol=1e-5)
    assert "has no such column. Did you mean first?" in refused(
        lambda: next(predict_file(run, other, ("key", "second", "first"), "frst"))
    )


def test_images_on_disk_come_in_large_pieces(image_run: Path, tmp_path: Path) -> None:
    for i in range(300):
        (tmp_path / f"{i}.png").touch()
    run = open_run(image_run)
    (piece,) = predict._pieces(run, tmp_path, None, None)  # each starts loader processes anew
    assert len(piece[1]) == 300
    assert run.encode(read_tables(run.spec.data, 0).validation).dataset._cached is None


def test_images_of_folders_files_and_tables(
    image_run: Path, material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setitem(predict.PIECE_ROWS, "path", 5)
    paths = image_paths(material.validation_images)
    expected = plain_image_logits(image_run, paths).softmax(1)
    code, out, _ = ended(capsys, "predict", image_run, material.validation_images)
    found = [json.loads(line) for line in out.splitlines()]
    assert (code, [row["id"] for row in found]) == (0, paths)
    given = torch.tensor([list(row["probabilities"].values()) for row in found])
    assert list(found[0]["probabilities"]) == ["blue", "green", "red"]
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)
    assert next(predict_file(image_run, Path(paths[3]))).probabilities == pytest.approx(found[3]["probabilities"])
    table = tmp_path / "rows.csv"
    table.write_text("image\n" + "\n".join(paths[5:8]))
    assert [row.label for row in predict_file(image_run, table)] == [row["label"] for row in found[5:8]]
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(Path(paths[0]).read_bytes()[:200])
    assert "a.png: a damaged image file" in refused(lambda: list(predict_file(image_run, tmp_path / "images")))


def test_inputs_of_the_wrong_kind_are_refused(text_run: Path, image_run: Path, material: Material) -> None:
    assert "is a folder, and" in refused(lambda: next(predict_file(text_run, material.images)))
    assert "lacks the column 'image'" in refused(lambda: next(predict_file(image_run, material.train)))
    assert "leave --columns and --id out" in refused(lambda: next(predict_file(image_run, material.images, ("a",))))
    absent = material.folder / "validaton.csv"
    assert "FILE: " in (message := refused(lambda: next(predict_file(text_run, absent))))
    assert "Did you mean validation.csv" in message


def test_an_unfinished_run_says_how_to_go_on(
    text_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("config.yaml", "plan.json"):
        (tmp_path / name).write_bytes((text_run / name).read_bytes())
    for command in (["evaluate", tmp_path], ["predict", tmp_path, "x.csv"], ["export", tmp_path, "--to", "hf"]):
        code, _, err = ended(capsys, *command)
        assert (code, err) == (
            2,
            f"error: {tmp_path} has no model/ yet: the run is unfinished. Go on with: "
            f"dist-finetune resume {tmp_path}\n",
        )
    write_json(tmp_path / "summary.json", {"status": "finished", "folded_note": "none: no linear head was fitted"})
    assert "is finished, and has no model/: no linear head was fitted" in refused(lambda: evaluate_run(tmp_path))


def test_export_copies_what_its_library_loads(
    text_run: Path, image_run: Path, material: Material, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = ended(capsys, "export", text_run, "--to", "hf")
    assert (code, out.splitlines()[0]) == (0, str(text_run / "model"))
    made = export_run(text_run, "hf", tmp_path / "text")
    assert "AutoModelForSequenceClassification" in made.how_to_load
    assert sorted(path.name for path in made.folder.iterdir()) == sorted(
        path.name for path in (text_run / "model").iterdir()
    )
    paths = image_paths(material.validation_images)
    expected = plain_image_logits(image_run, paths)
    made = export_run(image_run, "timm", tmp_path / "timm")
    model = timm.create_model("test_resnet", num_classes=3, checkpoint_path=made.folder / "model.safetensors").eval()
    transform = timm.data.create_transform(
        **timm.data.resolve_data_config({}, model=timm.create_model(f"local-dir:{made.folder}", pretrained=True))
    )
    images = torch.stack([transform(Image.open(path)) for path in paths])
    torch.testing.assert_close(model(images).detach(), expected, rtol=0, atol=0)
    made = export_run(image_run, "hf", tmp_path / "hf")
    check_in_transformers(made.folder, paths, expected)


def check_in_transformers(folder: Path, paths: list[str], expected: torch.Tensor) -> None:
    model, info = AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert list(model.config.id2label.values()) == ["blue", "green", "red"]
    pixels = AutoImageProcessor.from_pretrained(folder)([Image.open(p).convert("RGB") for p in paths])["pixel_values"]
    with torch.no_grad():
        given = model.eval()(torch.as_tensor(np.stack(list(pixels)))).logits
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-4)


def test_a_vit_of_timm_at_another_size_loads_in_transformers(material: Material, tmp_path: Path) -> None:
    config = material.image(model={"name": "timm:test_vit", "weights": "none"}, freeze="none")
    run = write_run(config, tmp_path, "r")
    paths = image_paths(material.validation_images)
    expected = plain_image_logits(run, paths)
    check_in_transformers(export_run(run, "hf", tmp_path / "hf").folder, paths, expected)
    torch.testing.assert_close(evaluate_run(run).evaluation.logits, expected, rtol=1e-4, atol=1e-5)


def test_a_format_that_does_not_suit_is_refused(
    text_run: Path, image_run: Path, material: Material, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = ended(capsys, "export", text_run, "--to", "timm")
    assert code == 2
    assert "is a transformers model, and timm has no class that its weights fit. Use --to hf or --to onnx" in err
    config = material.image(model={"name": "torchvision:mobilenet_v3_small", "weights": "none"}, freeze="none")
    run = write_run(config, tmp_path, "r")
    message = refused(lambda: export_run(run, "hf"))
    assert "is a torchvision model" in message
    assert "Use --to onnx; or load it as" in message
    assert evaluate_run(run).num_rows == NUM_VALIDATION_IMAGES
    assert "is there already" in refused(lambda: export_run(image_run, "timm", tmp_path))
    code, _, err = ended(capsys, "export", text_run, "--to", "tensorflow")
    assert (code, "onnx" in err) == (2, True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["text", "image"])
def test_onnx_runtime_gives_the_logits_at_other_sizes(
    text_run: Path, image_run: Path, material: Material, tmp_path: Path, kind: str
) -> None:
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason="the onnx extra is absent")
    onnxruntime = pytest.importorskip("onnxruntime", reason="the onnx extra is absent")
    made = export_run({"text": text_run, "image": image_run}[kind], "onnx", tmp_path / "onnx")
    assert "onnxruntime gives the model's logits" in made.notes[0]
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx")
    if kind == "text":
        texts, _ = validation_texts(material)
        expected, tokenizer = plain_text_logits(text_run, texts), AutoTokenizer.from_pretrained(tmp_path / "onnx")
        batch = tokenizer(texts, truncation=True, max_length=12, padding=True, return_tensors="np")
        shape = ["batch", "sequence"]
    else:
        expected = plain_image_logits(image_run, image_paths(material.validation_images))
        run, paths = open_run(image_run), image_paths(material.validation_images)
        assert run.image is not None
        batch = {"image": np.stack([normalised(evaluation_pixels(Image.open(p), run.image), run.image) for p in paths])}
        shape = ["batch", 3, 32, 32]
    names = [given.name for given in session.get_inputs()]
    assert [given.shape for given in session.get_inputs()] == [shape] * len(names)
    said = json.loads((tmp_path / "onnx" / "model.json").read_text())
    assert (said["inputs"], len(said["classes"])) == (names, 3)
    (found,) = session.run(["logits"], {name: batch[name] for name in names})
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-4)


def test_onnx_without_its_packages_says_what_to_install(text_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)  # how Python itself notes that a module is not to be had
    assert "pip install 'dist-finetune[onnx]'" in refused(lambda: export_run(text_run, "onnx"))
