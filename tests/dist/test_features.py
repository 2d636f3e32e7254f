"""Features over processes: each row once, the same at any world size, resumed where they stopped; heads that leave."""

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from harness import Job, Run, RunJobs, command, finish, read_json, stored_features, write_config
from material import NUM_IMAGES, NUM_TRAIN, NUM_VALIDATION, NUM_VALIDATION_IMAGES, Material, write_sentences
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from dist_finetune.features.heads import make_head
from dist_finetune.spec_file import load_spec

pytestmark = pytest.mark.dist

FEATURES = {"task": "features", "freeze": "none"}
BATCH = {"train": {"eval_batch_size": 4}}
NUM_TEST = 29


@pytest.fixture(scope="module")
def feature_runs(material: Material, runs: RunJobs) -> dict[str, Run]:
    """A BERT, with test rows, and a CNN at 1, 2 and 4 processes."""
    test = material.folder / "features_test.csv"
    write_sentences(test, NUM_TEST, seed=2)
    jobs = {
        "text": material.text(**FEATURES, **BATCH, features={"class_weight": "balanced"}, data={"test": str(test)}),
        "image": material.image(**FEATURES, **BATCH, features={"heads": ["softmax", "svm"], "pool": "pyramid"}),
    }
    found: dict[str, Run] = {}
    for num in (1, 2, 4):
        done = runs([Job(f"{kind}-{num}", config) for kind, config in jobs.items()], num)
        found |= done
    return found


def features_of(run: Run, split: str, depth: str) -> tuple[np.ndarray, np.ndarray]:
    return stored_features(Path(run.folder.parents[1], run.summary["features"]), split, depth)


@pytest.mark.parametrize("num", [2, 4])
@pytest.mark.parametrize("kind", ["text", "image"])
def test_features_are_bit_identical_at_any_number_of_processes(
    feature_runs: dict[str, Run], kind: str, num: int
) -> None:
    one, many = feature_runs[f"{kind}-1"], feature_runs[f"{kind}-{num}"]
    rows = {"text": (NUM_TRAIN, NUM_VALIDATION, NUM_TEST), "image": (NUM_IMAGES, NUM_VALIDATION_IMAGES)}[kind]
    assert (one.summary["world_size"], many.summary["world_size"]) == (1, num)
    assert one.summary["extracted_rows"] == many.summary["extracted_rows"] == sum(rows)
    depths = list(dict.fromkeys(result["depth"] for result in one.summary["results"]))
    assert depths[0] == "stem"
    assert depths[-1] == "head"
    for split, num_rows in zip(("train", "validation", "test"), rows, strict=kind == "text"):
        for depth in depths:
            ours, labels = features_of(one, split, depth)
            theirs, their_labels = features_of(many, split, depth)
            assert len(ours) == num_rows
            assert np.array_equal(labels, their_labels)
            assert np.array_equal(ours, theirs), (split, depth)


@pytest.mark.parametrize("num", [2, 4])
@pytest.mark.parametrize("kind", ["text", "image"])
def test_heads_are_the_same_at_any_number_of_processes(feature_runs: dict[str, Run], kind: str, num: int) -> None:
    one, many = (feature_runs[f"{kind}-{world_size}"].summary["results"] for world_size in (1, num))
    assert [{**r, "fit_s": 0} for r in one] == [{**r, "fit_s": 0} for r in many]
    assert len(one) == {"text": 5 * 3, "image": 6 * 2}[kind]


def test_the_exported_bert_predicts_what_scikit_learn_does(feature_runs: dict[str, Run], material: Material) -> None:
    run = feature_runs["text-2"]
    folded = run.summary["folded"]
    features, labels = features_of(run, "train", "head")
    unseen, _ = features_of(run, "validation", "head")
    head = make_head(folded["head"], folded["regularisation"], "balanced", 0)
    expected = head.fit(features.astype(np.float64), labels).predict(unseen.astype(np.float64))
    model = AutoModelForSequenceClassification.from_pretrained(run.folder / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(run.folder / "model")
    texts = [line.rsplit(",", 1)[0] for line in material.validation.read_text().splitlines()[1:]]
    with torch.no_grad():
        predicted = [int(model(**tokenizer(text, return_tensors="pt")).logits.argmax()) for text in texts]
    assert predicted == expected.tolist()
    assert run.summary["num_rows_predicted_alike"] == NUM_VALIDATION
    assert sorted(model.config.label2id) == ["food", "music", "weather"]


def test_every_head_is_measured_on_the_test_rows(feature_runs: dict[str, Run]) -> None:
    run = feature_runs["text-2"]
    heads = load_file(run.folder / "heads" / "linear.safetensors")
    linear = [result for result in run.summary["results"] if result["head"] != "rbf-svm"]
    assert len(linear) == 5 * 2
    for result in linear:
        features, labels = features_of(run, "test", result["depth"])
        weight, bias = (heads[f"{result['depth']}/{result['head']}/{part}"].numpy() for part in ("weight", "bias"))
        right = np.sum((features.astype(np.float64) @ weight.T + bias).argmax(1) == labels)
        assert (result["test_accuracy"], len(labels)) == (right / NUM_TEST, NUM_TEST)
    best = run.summary["best"]
    assert run.summary["metrics"] == {"eval/accuracy": best["accuracy"], "test/accuracy": best["test_accuracy"]}
    assert {result["test_accuracy"] for result in feature_runs["image-1"].summary["results"]} == {None}


def test_the_exported_cnn_loads_in_timm_and_kept_its_body(feature_runs: dict[str, Run], material: Material) -> None:
    run = feature_runs["image-2"]
    model = timm.create_model(f"local-dir:{run.folder / 'model'}", pretrained=True)
    before = load_file(material.cnn_weights)
    body = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("fc.")}
    assert len(body) > 20
    assert all(torch.equal(tensor, before[name]) for name, tensor in body.items())


def test_the_rbf_svm_is_kept_without_pickle(feature_runs: dict[str, Run]) -> None:
    import skops.io

    run = feature_runs["text-1"]
    file = run.folder / "heads" / "rbf-svm.skops"
    assert not skops.io.get_untrusted_types(file=file)
    depth = read_json(file.with_suffix(".json"))["depth"]
    unseen, labels = features_of(run, "validation", depth)
    accuracy = np.mean(skops.io.load(file).predict(unseen.astype(np.float64)) == labels)
    stated = [r["accuracy"] for r in run.summary["results"] if (r["depth"], r["head"]) == (depth, "rbf-svm")]
    assert stated == [accuracy]


def test_extraction_goes_on_where_it_stopped_at_another_world_size(material: Material, tmp_path: Path) -> None:
    options = {"at": ["stem", "head"], "heads": ["softmax"]}
    config = write_config(
        tmp_path / "c.yaml", material.text(**FEATURES, **BATCH, features=options), output=str(tmp_path / "runs")
    )
    assert command("train", config, folder=tmp_path, num_processes=2).returncode == 0
    folder = tmp_path / "runs" / "c"
    store = Path(read_json(folder / "summary.json")["features"])
    shards = sorted((store / "train").iterdir())
    # Copies: tensors of a file that is mapped into memory would change with it.
    before = [{name: tensor.clone() for name, tensor in load_file(path).items()} for path in shards]
    assert len(shards) >= 32
    stamps = {path: path.stat().st_mtime_ns for path in shards}
    (folder / "summary.json").unlink()  # as if it had been killed
    shards[3].unlink()
    shards[7].write_bytes(shards[7].read_bytes()[:-100])
    done = command("train", config, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    changed = [path for path in shards if path.stat().st_mtime_ns != stamps[path]]
    assert changed == [shards[3], shards[7]]
    assert read_json(folder / "summary.json")["extracted_rows"] == sum(len(before[i]["ids"]) for i in (3, 7))
    after = [load_file(path) for path in shards]
    assert all(torch.equal(a[name], b[name]) for a, b in zip(after, before, strict=True) for name in b)
    again = command("train", config, folder=tmp_path)
    assert "is finished" in again.stdout


def test_extraction_stops_at_its_time_limit_and_is_resumed(material: Material, tmp_path: Path) -> None:
    options = material.text(
        **FEATURES, **BATCH, launch={"time_limit": 0.5}, features={"at": ["head"], "heads": ["svm"]}
    )
    config = write_config(tmp_path / "c.yaml", options, output=str(tmp_path / "runs"))
    done = command("train", config, folder=tmp_path, num_processes=2)
    folder = tmp_path / "runs" / "c"
    assert done.returncode == 75, done.stderr[-3000:]
    assert read_json(folder / "summary.json")["status"] == "stopped"
    assert "launch.time_limit" in read_json(folder / "summary.json")["message"]
    done = command("resume", folder, "launch.time_limit=null", folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert 0 < read_json(folder / "summary.json")["extracted_rows"] < NUM_TRAIN + NUM_VALIDATION


def test_one_ranks_bad_depth_and_idle_settings_are_refused_by_all(material: Material, runs: RunJobs) -> None:
    jobs = [
        Job("depth", material.text(**FEATURES, features={"at": ["9"]})),
        Job("pool", material.text(**FEATURES, features={"pool": "pyramid"})),
        Job("idle", material.text(task="features")),
    ]
    done = runs(jobs, 2, may_fail=True)
    words = {"depth": "numbers 0 to 2", "pool": "needs a feature map", "idle": "freeze would have no effect"}
    for name, expected in words.items():
        for rank in done[name].by_rank:
            assert rank["error"] == "UserError"
            assert expected in rank["message"]
        assert not done[name].folder.exists()


def test_features_and_advise_take_any_training_config_as_it_is(material: Material, tmp_path: Path) -> None:
    """Here one whose freeze, augmentation and cache make no sense without training."""
    only_training = {"freeze": "backbone", "cache": {"mode": "on", "views": 2}, "output": str(tmp_path / "runs")}
    base = material.image(**BATCH, features={"at": ["head"]}, data={"augment": True})
    config = write_config(tmp_path / "c.yaml", base | only_training)
    extract = [sys.executable, "-m", "dist_finetune", "features", str(config), "--processes", "2"]
    done = finish(extract, 200, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    advised = command("advise", config, folder=tmp_path)
    assert advised.returncode == 0, advised.stderr[-3000:]
    ready = load_spec(tmp_path / "runs" / "c-advise" / "advice.yaml")
    assert ready.freeze.is_none()
    assert (ready.task == "features") == (not ready.phases)
    folder = tmp_path / "runs" / "c-features"
    assert sorted(path.name for path in folder.iterdir() if path.suffix == ".svg") == ["features.svg"]
    assert read_json(folder / "summary.json")["world_size"] == 2


def test_strategy_auto_measures_once_and_trains_by_it(material: Material, tmp_path: Path) -> None:
    base: dict[str, Any] = material.text(strategy="auto", freeze="none")
    config = write_config(tmp_path / "c.yaml", base, output=str(tmp_path / "runs"))
    done = command("train", config, folder=tmp_path, num_processes=2, timeout_s=300)
    assert done.returncode == 0, done.stderr[-3000:]
    advice = read_json(tmp_path / "runs" / "c-advise" / "advice.json")
    assert advice["verdict"]["situation"].startswith("small")
    assert advice["verdict"]["config"]["task"] == "features"
    assert read_json(tmp_path / "runs" / "c" / "summary.json")["status"] == "finished"
    assert load_spec(tmp_path / "runs" / "c" / "config.yaml").strategy is None
    shutil.rmtree(tmp_path / "runs" / "c")
    again = command("train", config, folder=tmp_path, num_processes=2, timeout_s=300)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "goes by" in again.stdout
    assert "probing" not in again.stdout
