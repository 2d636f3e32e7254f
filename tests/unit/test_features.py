"""Features are what the network computes; heads are scikit-learn's; what is folded predicts the same."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from sklearn.metrics import log_loss
from torch import nn
from transformers import AlbertConfig, AlbertForSequenceClassification, BertConfig, BertForSequenceClassification

from dist_finetune.data.loading import Rows
from dist_finetune.errors import TrainingError, UserError
from dist_finetune.features.depths import Capture, find_depths
from dist_finetune.features.extract import plan_shards
from dist_finetune.features.fold import fold_head, fold_problem
from dist_finetune.features.heads import (
    as_linear,
    choose_c,
    class_scores,
    fit_head,
    heads_for,
    make_head,
    out_of_fold,
    require_rows,
)
from dist_finetune.features.minibatch import fit_minibatch
from dist_finetune.features.pooling import pooled
from dist_finetune.features.results import HeadResult, plot_results, wilson_interval
from dist_finetune.features.store import FeatureKey, Store
from dist_finetune.models.structure import structure_of
from dist_finetune.spec_file import load_spec

CPU = torch.device("cpu")
TINY = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 50, "num_labels": 3}


def tiny_bert(depth: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(num_hidden_layers=depth, **TINY)).eval()


def text_batch() -> dict[str, Any]:
    """Three texts of 9, 5 and 2 tokens, padded on the right."""
    ids = torch.randint(1, 50, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4, [1] * 2 + [0] * 7])
    return {"inputs": {"input_ids": ids * mask, "attention_mask": mask}, "labels": torch.tensor([0, 1, 2])}


def image_batch(size: int = 64) -> dict[str, Any]:
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2))
    return {"inputs": images, "labels": torch.tensor([0, 1])}


def captured(model: nn.Module, batch: dict[str, Any], at: tuple[str, ...] = (), pool: Any = "auto") -> dict[str, Any]:
    structure = structure_of(model)
    with Capture(model, structure, find_depths(at, structure, model), pool) as capture:
        return capture.features(batch, CPU)


def blobs(num_rows: int, num_classes: int, num_features: int = 12, noise: float = 1.5) -> tuple[Any, Any]:
    """Overlapping Gaussian classes; features of very different scale and offset."""
    rng = np.random.default_rng(3)
    labels = np.arange(num_rows) % num_classes
    features = rng.normal(size=(num_classes, num_features))[labels] + noise * rng.normal(size=(num_rows, num_features))
    return (features * np.geomspace(0.01, 100, num_features) + 50).astype(np.float32), labels.astype(np.int64)


def test_features_of_a_bert_are_its_hidden_states_over_real_tokens_only() -> None:
    model, batch = tiny_bert(), text_batch()
    found = captured(model, batch)
    assert list(found) == ["stem", "block 0", "block 1", "block 2", "head"]
    with torch.no_grad():
        out = model.bert(**batch["inputs"], output_hidden_states=True)
    for label, states in zip(list(found)[:4], out.hidden_states, strict=True):
        by_hand = [states[row, :length].mean(dim=0) for row, length in enumerate((9, 5, 2))]
        torch.testing.assert_close(found[label], torch.stack(by_hand), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["head"], out.pooler_output)


def test_blocks_that_share_weights_are_told_apart() -> None:
    torch.manual_seed(0)
    model = AlbertForSequenceClassification(AlbertConfig(num_hidden_layers=3, embedding_size=16, **TINY)).eval()
    batch = text_batch()
    found = captured(model, batch, pool="cls")
    with torch.no_grad():
        states = model.albert(**batch["inputs"], output_hidden_states=True).hidden_states
    for i in range(3):
        torch.testing.assert_close(found[f"block {i}"], states[i + 1][:, 0])
    assert not torch.equal(found["block 0"], found["block 2"])


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_vit"])
def test_head_reads_the_depth_head_of_timm_models(name: str) -> None:
    model = timm.create_model(name, num_classes=5).eval()
    size = model.pretrained_cfg["input_size"][-1]
    batch = image_batch(size)
    found = captured(model, batch)
    with torch.no_grad():
        logits = model(batch["inputs"])
        torch.testing.assert_close(model.get_classifier()(found["head"]), logits)
    assert all(features.ndim == 2 and len(features) == 2 for features in found.values())


def test_a_forward_pass_ends_at_the_deepest_depth_that_is_wanted() -> None:
    model, runs = tiny_bert(), []
    model.bert.encoder.layer[2].register_forward_hook(lambda *_: runs.append(2))
    captured(model, text_batch(), at=("stem", "0-1"))
    assert runs == []
    captured(model, text_batch(), at=("2",))
    assert runs == [2]


def test_hooks_are_gone_afterwards() -> None:
    model = tiny_bert()
    captured(model, text_batch())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("at", "words"), [("7", "numbers 0 to 2"), ("haed", "Did you mean head"), ("0-1,9", "out of range")]
)
def test_a_depth_that_is_none_is_refused_with_the_valid_ones(at: str, words: str) -> None:
    model = tiny_bert()
    with pytest.raises(UserError, match=f"features.at: .*{words}"):
        find_depths((at,), structure_of(model), model)


def test_depths_take_negative_numbers_ranges_and_both_words_for_the_stem() -> None:
    model = tiny_bert()
    labels = [d.label for d in find_depths(("-1", "embeddings", "0-1"), structure_of(model), model)]
    assert labels == ["stem", "block 0", "block 1", "block 2"]


def test_pooling_of_tokens_heeds_padding_on_either_side() -> None:
    tokens = torch.arange(24.0).reshape(2, 3, 4)
    mask = torch.tensor([[0, 1, 1], [1, 1, 0]])
    assert torch.equal(
        pooled(tokens, "mean", mask, 2, "x"), torch.stack([tokens[0, 1:].mean(0), tokens[1, :2].mean(0)])
    )
    assert torch.equal(pooled(tokens, "cls", mask, 2, "x"), torch.stack([tokens[0, 1], tokens[1, 0]]))
    assert torch.equal(pooled(-tokens, "max", mask, 2, "x"), torch.stack([-tokens[0, 1], -tokens[1, 0]]))


def test_pooling_of_maps_in_either_layout() -> None:
    maps = torch.randn(2, 6, 4, 4)
    assert torch.equal(pooled(maps, "gap", None, 2, "x"), maps.mean(dim=(2, 3)))
    assert torch.equal(pooled(maps.permute(0, 2, 3, 1), "auto", None, 2, "x"), maps.mean(dim=(2, 3)))
    pyramid = pooled(maps, "pyramid", None, 2, "x")
    assert pyramid.shape == (2, 30)
    torch.testing.assert_close(pyramid[:, 6::4], maps[:, :, :2, :2].mean(dim=(2, 3)))


@pytest.mark.parametrize(("pool", "shape"), [("pyramid", (2, 3, 4)), ("gap", (2, 3, 4)), ("cls", (2, 3, 4, 4))])
def test_a_pooling_that_means_nothing_here_is_refused(pool: Any, shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=f"features.pool: {pool} needs .*block 1"):
        pooled(torch.zeros(shape), pool, None, 2, "block 1")


def test_an_output_with_another_batch_dimension_is_refused() -> None:
    with pytest.raises(UserError, match="batch is not its first dimension"):
        pooled(torch.zeros(7, 2, 4), "mean", None, 2, "block 1")


@pytest.mark.parametrize("kind", ["softmax", "svm"])
@pytest.mark.parametrize("num_classes", [2, 4])
def test_one_linear_map_gives_scikit_learns_predictions_exactly(kind: Any, num_classes: int) -> None:
    features, labels = blobs(160, num_classes)
    unseen, _ = blobs(2000, num_classes, noise=4.0)
    fit = fit_head(kind, "head", features, labels, num_classes, None, seed=0)
    assert fit.linear is not None
    assert np.array_equal(fit.scores(unseen).argmax(1), fit.estimator.predict(unseen.astype(np.float64)))
    raw = as_linear(fit.estimator, 1.0).scores(unseen)
    np.testing.assert_allclose(raw, class_scores(fit.estimator, unseen, num_classes), rtol=1e-6, atol=1e-6)


def test_an_rbf_svm_is_scored_as_it_predicts() -> None:
    features, labels = blobs(150, 3)
    fit = fit_head("rbf-svm", "head", features, labels, 3, None, seed=0)
    assert fit.linear is None
    assert np.array_equal(fit.scores(features).argmax(1), fit.estimator.predict(features.astype(np.float64)))


def test_temperature_calibrates_and_changes_no_prediction() -> None:
    features, labels = blobs(600, 3, noise=3.0)
    fit = fit_head("svm", "head", features[:300], labels[:300], 3, None, seed=0)
    scores = fit.scores(features[300:])
    as_probability = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    raw = scores / fit.temperature
    uncalibrated = np.exp(raw) / np.exp(raw).sum(1, keepdims=True)
    assert fit.temperature > 0
    assert log_loss(labels[300:], as_probability) < log_loss(labels[300:], uncalibrated)


def test_held_out_scores_come_from_heads_that_never_saw_the_row() -> None:
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(120, 200)), rng.integers(0, 2, 120)
    head = make_head("softmax", 10.0, None, 0)
    assert head.fit(features, labels).score(features, labels) == 1.0
    assert np.mean(out_of_fold(head, features, labels, 2, 0).argmax(1) == labels) < 0.65


def test_a_class_of_one_row_is_counted_as_wrong_and_stops_nothing() -> None:
    features, labels = blobs(41, 2)
    labels[0] = 2
    _, accuracy, scores, held = choose_c("softmax", features, labels, 3, None, 0)
    assert accuracy == np.mean(scores.argmax(1) == held) < 1.0
    assert np.all(scores[held == 2][:, 2] == -np.inf)


def test_classes_of_one_row_each_are_all_counted_as_wrong() -> None:
    """`advise` cross-validates on half of the rows, which of two rows a class are one of each."""
    features, _ = blobs(4, 2)
    _, accuracy, scores, held = choose_c("softmax", features[:2], np.array([0, 1]), 2, None, 0)
    assert accuracy == 0.0
    assert scores.argmax(1).tolist() == (1 - held).tolist()


def test_balanced_weights_find_more_of_the_rare_class() -> None:
    features, labels = blobs(400, 2, noise=4.0)
    kept = np.flatnonzero((labels == 0) | (np.arange(400) % 20 == 1))
    features, labels = features[kept], labels[kept]
    found = [
        int(np.sum(fit_head("softmax", "head", features, labels, 2, weight, 0).scores(features)[labels == 1].argmax(1)))
        for weight in (None, "balanced")
    ]
    assert found[1] > found[0]


def test_rbf_is_left_out_of_large_sets_with_a_note() -> None:
    assert heads_for(("softmax", "rbf-svm"), 5000) == (("softmax", "rbf-svm"), ())
    kinds, notes = heads_for(("softmax", "rbf-svm"), 5001)
    assert kinds == ("softmax",)
    assert "5,001" in notes[0]


def test_an_rbf_svm_alone_on_a_large_set_is_refused() -> None:
    with pytest.raises(UserError, match=r"rbf-svm: 5,001 training rows, it takes up to 5,000; add softmax"):
        heads_for(("rbf-svm",), 5001)


@pytest.mark.parametrize("heads", [[], ["svm", "svm"]])
def test_a_list_of_no_head_or_of_one_twice_is_refused(heads: list[str]) -> None:
    with pytest.raises(UserError, match=r"features\.heads: .*(at least one|twice)"):
        load_spec({"model": {"name": "m"}, "data": {"train": "t.csv"}, "name": "x", "features": {"heads": heads}})


def test_classes_of_one_row_can_not_be_compared() -> None:
    require_rows([0, 0, 1, 1, 2])
    for labels in ([0, 1], [0, 0, 0, 1, 2]):
        with pytest.raises(UserError, match="two classes with two rows or more"):
            require_rows(labels)


def test_a_fold_that_lacks_a_class_names_the_other() -> None:
    features, labels = blobs(41, 2)
    labels[:] = 0
    labels[7] = 1
    _, accuracy, scores, held = choose_c("svm", features, labels, 2, None, 0)
    assert accuracy == 40 / 41
    assert scores[held == 1].argmax(1).tolist() == [0]


def test_a_rare_class_of_a_large_set_takes_part_in_cross_validation() -> None:
    labels = np.zeros(60_000, np.int64)
    labels[::7000] = 1  # nine rows, of which a plain sample of 5,000 would hold one or none
    features = np.stack([labels + 0.1, np.arange(60_000) % 3], axis=1).astype(np.float32)
    _, accuracy, _, held = choose_c("softmax", features, labels, 2, None, 0, grid=(1.0,))
    assert (len(held), accuracy) == (5000, 1.0)
    assert 5 <= np.sum(held == 1) <= 9


STAND_IN = """
import sys
from pathlib import Path
def install(disable_uvm):
    assert "sklearn" not in sys.modules
    Path(__file__).with_name("installed").touch()
"""
START = """
from dist_finetune.worker import run_task
from dist_finetune.features.accelerate import accelerate_heads
print(accelerate_heads(False), accelerate_heads(True))
import dist_finetune.features.run
print(accelerate_heads(True))
"""


def test_cuml_comes_before_scikit_learn_and_only_where_a_gpu_is(tmp_path: Path) -> None:
    package = tmp_path / "cuml"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "accel.py").write_text(STAND_IN)
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    command = [sys.executable, "-c", START]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=120)
    assert done.stdout == "False True\nFalse\n", done.stderr[-2000:]
    assert (package / "installed").exists()


KEY = FeatureKey("w", "i", "t", ("head",), "auto", "fp32", 8)


def stored(folder: Path, features: Any, labels: Any, shard_rows: int = 100) -> Store:
    """A store whose rows are shuffled over shards, as rows sorted by length are."""
    store = Store(folder, KEY)
    order = np.random.default_rng(0).permutation(len(labels))
    for number, start in enumerate(range(0, len(order), shard_rows)):
        ids = order[start : start + shard_rows]
        tensors = {"ids": ids, "labels": labels[ids], "head": features[ids]}
        store.write("train", number, {name: torch.from_numpy(value) for name, value in tensors.items()})
    return store


@pytest.mark.parametrize(("kind", "num_classes"), [("softmax", 3), ("svm", 3), ("softmax", 10)])
def test_minibatch_heads_come_close_to_scikit_learns(kind: Any, num_classes: int, tmp_path: Path) -> None:
    """Of ten classes in turn, as in many files, every tenth row would be of one class."""
    features, labels = blobs(4000, num_classes)
    store = stored(tmp_path, features, labels)
    exact = fit_head(kind, "head", features, labels, num_classes, None, seed=0)
    fit = fit_minibatch(kind, "head", store, 4000, num_classes, None, seed=0)
    accuracies = [np.mean(f.scores(features).argmax(1) == labels) for f in (exact, fit)]
    assert accuracies[0] > 0.7
    assert abs(accuracies[1] - accuracies[0]) < 0.02
    assert abs(fit.cv_accuracy - accuracies[1]) < 0.06


def test_stored_features_come_back_in_the_order_of_the_data(tmp_path: Path) -> None:
    features, labels = blobs(250, 3)
    store = stored(tmp_path, features, labels)
    again, targets = store.read("train", "head", 250)
    assert np.array_equal(again, features)
    assert np.array_equal(targets, labels)


def test_a_missing_shard_is_told(tmp_path: Path) -> None:
    store = stored(tmp_path, *blobs(250, 3))
    store.path("train", 1).unlink()
    with pytest.raises(UserError, match="150 of 250 rows"):
        store.read("train", "head", 250)


def test_features_that_can_not_be_written_are_told(tmp_path: Path) -> None:
    (tmp_path / "train").write_text("a file where the folder should be")
    with pytest.raises(TrainingError, match=r"train/00000.safetensors: features can't be written: .*exists"):
        stored(tmp_path, *blobs(250, 3))
    with pytest.raises(TrainingError, match="Not a directory"):
        Store(tmp_path / "train" / "key", KEY).open()


def test_only_a_whole_shard_of_the_same_rows_counts(tmp_path: Path) -> None:
    store = stored(tmp_path, *blobs(250, 3))
    ids = load_file(store.path("train", 0))["ids"].numpy()
    assert store.holds("train", 0, ids)
    assert not store.holds("train", 0, ids[::-1])
    assert not Store(tmp_path, FeatureKey("w", "i", "t", ("head", "block 0"), "auto", "fp32", 8)).holds("train", 0, ids)
    path = store.path("train", 0)
    path.write_bytes(path.read_bytes()[:-8])
    assert not store.holds("train", 0, ids)
    assert not store.holds("train", 99, ids)


def test_shards_hold_every_row_once() -> None:
    lengths = np.random.default_rng(0).integers(2, 30, 997).astype(np.int32)
    rows = Rows(list(range(997)), list, lengths)  # type: ignore[arg-type]
    shards = plan_shards(rows, 8)
    assert np.array_equal(np.sort(np.concatenate([shard.ids for shard in shards])), np.arange(997))
    assert 32 <= len(shards) <= 64


def test_every_part_of_a_key_changes_it() -> None:
    values = {"weights_sha256": "x", "inputs_sha256": "x", "transform": "x", "depths": ("stem",), "pool": "cls"}
    values |= {"precision": "bf16", "batch_size": 9, "pass_tokens": 2048}
    digests = {FeatureKey(**{**vars(KEY), name: value}).digest for name, value in values.items()}
    assert len(digests | {KEY.digest}) == 9


def test_a_folded_bert_predicts_as_the_head() -> None:
    model, batch = tiny_bert(), text_batch()
    structure = structure_of(model)
    features = captured(model, batch, at=("head",))["head"].numpy()
    fit = fit_head("softmax", "head", *blobs(90, 3, num_features=32), 3, None, seed=0)
    assert fold_problem(structure, model, 3) is None
    fold_head(structure, model, fit.linear)
    with torch.no_grad():
        logits = model(**batch["inputs"]).logits.double().numpy()
    np.testing.assert_allclose(logits, fit.scores(features), rtol=1e-4, atol=1e-4)


def test_a_model_that_no_head_fits_says_why() -> None:
    model = tiny_bert()
    assert "gives 3 values for 4 classes" in str(fold_problem(structure_of(model), model, 4))
    bare = timm.create_model("test_resnet", num_classes=0)
    assert "no linear layer" in str(fold_problem(structure_of(bare), bare, 3))


def test_the_interval_is_wilsons() -> None:
    low, high = wilson_interval(8, 10)
    assert (round(low, 4), round(high, 4)) == (0.4902, 0.9433)  # as R's prop.test(8, 10, correct=FALSE) gives
    assert wilson_interval(0, 10)[0] == 0.0
    assert wilson_interval(10, 10)[1] == pytest.approx(1.0)


def test_the_plot_is_a_picture_with_every_head_in_it(tmp_path: Path) -> None:
    results = [
        HeadResult(depth, kind, 0.8, 0.7, 0.9, None, 0.8, 1.0, 0.5, True, 4)  # type: ignore[arg-type]
        for depth in ("stem", "head")
        for kind in ("softmax", "svm")
    ]
    plot_results(results, ["stem", "head"], "a title", tmp_path / "plot.svg")
    text = (tmp_path / "plot.svg").read_text()
    assert all(f">{word}<" in text for word in ("softmax", "svm", "stem", "head", "a title"))
    assert json.dumps(text)
