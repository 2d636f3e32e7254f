"""Advice follows from what was measured: LogME is the maximised evidence, each situation has its own config."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import unused_model
from datasets import Dataset
from harness import read_json, read_lines, stored_features
from material import NUM_TRAIN, Material, write_material
from safetensors.torch import load_file
from scipy.optimize import minimize
from scipy.stats import multivariate_normal
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    AutoConfig,
    BertConfig,
    BertForSequenceClassification,
)

from dist_finetune import train
from dist_finetune.advise import situation
from dist_finetune.advise.costs import cost_of, merged
from dist_finetune.advise.logme import logme
from dist_finetune.advise.probes import GRID, MAX_ROWS, Evidence, Probe, depth_words, sample_tables
from dist_finetune.advise.run import advise, follow_advice
from dist_finetune.advise.situation import choices, judge
from dist_finetune.advise.text import config_block, plot_probes, ready_yaml
from dist_finetune.data.columns import Columns
from dist_finetune.data.tables import Tables, read_tables
from dist_finetune.errors import UserError
from dist_finetune.freeze import compile_freeze
from dist_finetune.models.structure import Structure, structure_of
from dist_finetune.plan import for_planning
from dist_finetune.spec import Spec
from dist_finetune.spec_file import load_spec
from dist_finetune.topology import Topology

TINY = {"hidden_size": 8, "num_attention_heads": 1, "intermediate_size": 8, "vocab_size": 9}


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return write_material(tmp_path_factory.mktemp("material"))


def bert(depth: int) -> nn.Module:
    return BertForSequenceClassification(BertConfig(num_hidden_layers=depth, **TINY))


def albert(depth: int, num_groups: int) -> nn.Module:
    sizes = {"num_hidden_layers": depth, "num_hidden_groups": num_groups, "embedding_size": 8}
    return AlbertForSequenceClassification(AlbertConfig(**sizes, **TINY))


@cache
def of_depth(depth: int) -> Structure:
    return structure_of(bert(depth))


def spec_of(**more: Any) -> Spec:
    return load_spec({"model": {"name": "demo:minilm"}, "data": {"train": "rows.csv"}, "name": "x", **more})


def evidence(accuracies: list[float], num_rows: int = 400, num_classes: int = 2) -> Evidence:
    """Stem, four blocks and head with these probe accuracies."""
    words = ["stem", "0", "1", "2", "3", "head"]
    probes = tuple(
        Probe(
            depth=word if word.isalpha() else f"block {word}",
            word=word,
            position={"stem": 0.0, "head": 1.0}.get(word, (i) / 4),
            accuracy=accuracy,
            standard_error=float(np.sqrt(accuracy * (1 - accuracy) / num_rows)),
            logme=accuracy,
        )
        for i, (word, accuracy) in enumerate(zip(words, accuracies, strict=True))
    )
    share = num_rows // num_classes
    return Evidence("text", num_rows, num_classes, share, share, share, min(num_rows, 2000), probes, 0.5, 0.01)


RISING = [0.5, 0.6, 0.7, 0.8, 0.9, 0.85]
PEAKED = [0.5, 0.6, 0.9, 0.7, 0.6, 0.55]


@pytest.mark.parametrize(
    ("accuracies", "num_rows", "situation", "choice"),
    [
        (RISING, 400, "small and similar", "features-last"),
        (PEAKED, 400, "small and different", "features-best"),
        (RISING, 5000, "large and similar", "fine-tune-top"),
        (PEAKED, 5000, "large and different", "fine-tune-all"),
    ],
)
def test_each_situation_follows_from_size_and_the_curves_peak(
    accuracies: list[float], num_rows: int, situation: str, choice: str
) -> None:
    found = judge(evidence(accuracies, num_rows), of_depth(4), default_lr=5e-5)
    assert (found.situation, found.choice) == (situation, choice)
    assert found.config == choices(evidence(accuracies, num_rows), of_depth(4), 5e-5)[choice]
    assert found.reasons[0].startswith(situation.split()[0])
    assert found.reasons[1].startswith(situation.split()[2])


def test_the_depth_of_the_features_is_the_peaks() -> None:
    assert judge(evidence(PEAKED), of_depth(4), 5e-5).config["features"]["at"] == ["1", "head"]
    assert judge(evidence(RISING), of_depth(4), 5e-5).config["features"]["at"] == ["3", "head"]
    headless = replace(evidence(RISING), probes=evidence(RISING).probes[:-1])
    assert judge(headless, of_depth(4), 5e-5).config["features"]["at"] == ["3"]


def test_a_peak_within_chance_is_none() -> None:
    close = [0.5, 0.6, 0.81, 0.8, 0.79, 0.7]
    assert "similar" in judge(evidence(close, 400), of_depth(4), 5e-5).situation
    assert "different" in judge(evidence(close, 40_000), of_depth(4), 5e-5).situation


def test_many_rows_over_very_many_classes_are_no_large_data() -> None:
    assert judge(evidence(RISING, 5000, 200), of_depth(4), 5e-5).situation.startswith("small")


def test_one_large_class_does_not_make_many_small_ones_large() -> None:
    uneven = replace(evidence(RISING, 5000, 20), smallest_class=20, median_class=30.0, largest_class=4000)
    found = judge(uneven, of_depth(4), 5e-5)
    assert found.situation.startswith("small")
    assert "the largest 200.0 times the smallest" in found.reasons[0]


def test_nothing_is_trained_where_the_probe_leaves_nothing_to_win() -> None:
    found = judge(evidence([0.5, 0.9, 0.95, 0.99, 0.995, 0.99], 5000), of_depth(4), 5e-5)
    assert found.choice == "features-last"
    assert "next to nothing to win" in found.reasons[2]


def test_a_perfect_score_on_few_rows_may_be_luck() -> None:
    probes = tuple(replace(probe, accuracy=1.0, standard_error=0.25) for probe in evidence(RISING, 4).probes)
    found = judge(replace(evidence(RISING, 4), probes=probes), of_depth(4), 5e-5)
    assert "too few rows to train layers with" in found.reasons[2]


@pytest.mark.parametrize("name", ["features-last", "features-best", "fine-tune-top", "fine-tune-all"])
@pytest.mark.parametrize("depth", [1, 4, 24])
def test_every_choice_is_a_valid_config(name: str, depth: int) -> None:
    part = choices(evidence(RISING), of_depth(depth), 5e-5)[name]
    spec = merged(spec_of(strategy="auto"), part)
    assert spec.strategy is None
    assert (spec.task == "features") == name.startswith("features")
    assert len(spec.phases) == (0 if spec.task else 2)


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda: bert(12), {"embeddings": True, "layers": "first 6"}),
        (lambda: bert(1), {"embeddings": True}),
        (lambda: albert(6, 1), {"embeddings": True}),
        (lambda: albert(6, 3), {"embeddings": True, "layers": "first 2"}),
        (lambda: timm.create_model("vgg11"), {"layers": "first 2"}),
        (lambda: unused_model.on_all(3), "none"),
    ],
    ids=["bert", "one block", "one set of weights", "three sets", "no stem", "no blocks"],
)
def test_the_lower_half_is_frozen_as_far_as_a_network_can_be(build: Any, expected: Any) -> None:
    with torch.device("meta"):
        model = build()
    part = choices(evidence(RISING), structure_of(model), 5e-5)["fine-tune-top"]
    assert part["phases"][1]["freeze"] == expected
    manifest = compile_freeze(merged(spec_of(), part).phases[1].freeze, structure_of(model), model)
    assert (manifest.num_frozen > 0) == (expected != "none")


def test_few_rows_are_seen_more_often() -> None:
    epochs = [
        choices(evidence(RISING, rows), of_depth(4), 5e-5)["fine-tune-all"]["phases"][1]["epochs"]
        for rows in (200, 2000, 20_000)
    ]
    assert epochs == [10, 4, 2]


def test_augmentation_is_left_out_where_features_are_extracted() -> None:
    part = choices(evidence(RISING), of_depth(4), 5e-5)["features-last"]
    assert merged(spec_of(data={"train": "folder", "augment": True}), part).data.augment is False


@pytest.mark.parametrize("name", ["features-last", "features-best", "fine-tune-top", "fine-tune-all"])
def test_advice_on_any_config_for_training_can_be_run(name: str) -> None:
    """What was frozen gives way, and a cache that was asked for is one where that is possible."""
    image = {"model": {"name": "demo:efficientnet-lite0"}, "data": {"train": "folder", "augment": True}}
    features = {"pool": "max", "class_weight": "balanced"}
    spec = spec_of(**image, freeze="backbone", cache={"mode": "on", "views": 2}, features=features)
    part = choices(evidence(RISING), of_depth(4), 5e-5)[name]
    found = merged(spec, part)
    assert found.freeze.is_none()
    assert len(found.phases) == (0 if "task" in part else 2)
    assert found.cache.mode == ("off" if "task" in part else "auto")
    assert found.cache.views == (None if "task" in part else 2)
    assert found.data.augment == ("task" not in part)
    assert (found.features.pool, found.features.class_weight) == ("max", "balanced")


@pytest.mark.parametrize("more", [{"freeze": "backbone"}, {"phases": "gradual"}, {"task": "features"}])
def test_auto_does_not_overrule_what_the_user_decided(more: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"strategy: auto .*{next(iter(more))}"):
        follow_advice(spec_of(strategy="auto", **more))


def test_what_is_not_known_yet_is_not_planned() -> None:
    with pytest.raises(UserError, match="dist-finetune advise"):
        for_planning(spec_of(strategy="auto"), 1)
    assert for_planning(spec_of(freeze="norms"), 1) == spec_of(freeze="norms")
    with pytest.raises(UserError, match="freeze would have no effect"):
        for_planning(spec_of(task="features", freeze="norms"), 1)


@pytest.mark.parametrize("num_features", [3, 40])
def test_logme_is_the_evidence_at_its_maximum(num_features: int) -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(30) % 2
    features = rng.normal(size=(30, num_features)) + labels[:, None]
    centred = features - features.mean(0)
    centred /= np.sqrt(np.mean(centred**2))
    target = (labels == 1) - 0.5

    def loss(logs: Any) -> float:
        covariance = np.exp(logs[0]) * centred @ centred.T + np.exp(logs[1]) * np.eye(30)
        return -float(multivariate_normal(np.zeros(30), covariance).logpdf(target))

    best = min((minimize(loss, start, method="Nelder-Mead") for start in ([0, 0], [-3, -2])), key=lambda r: r.fun)
    assert logme(features, labels, 2) == pytest.approx(-best.fun / 30, abs=2e-3)


def test_logme_prefers_features_that_tell_the_classes_apart() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(300) % 3
    noise = rng.normal(size=(300, 20))
    told = noise + np.eye(3)[labels] @ rng.normal(size=(3, 20))
    assert logme(told, labels, 3) > logme(noise, labels, 3) + 0.1
    assert logme(1000 * told + 5, labels, 3) == pytest.approx(logme(told, labels, 3), abs=1e-6)


def test_a_deep_network_is_probed_at_eight_blocks_ends_included() -> None:
    assert depth_words(3) == ("stem", "0", "1", "2", "head")
    words = depth_words(24)
    assert len(words) == 10
    assert (words[1], words[-2]) == ("0", "23")
    assert depth_words(0) == ("head",)


def test_the_sample_is_bounded_and_keeps_the_shares_of_classes() -> None:
    labels = [0] * 4000 + [1] * 980 + [2] * 20
    table = Dataset.from_dict({"text": [f"row {i}" for i in range(5000)], "label": labels})
    whole = Tables(table, table, table, ("a", "b", "c"), Columns("text", ("text",), None, ("label",)), "f")
    found = sample_tables(whole, seed=0)
    counts = np.bincount(found.train["label"])
    assert found.test is None
    assert counts.sum() == MAX_ROWS["text"]
    assert counts.tolist() == [1600, 392, 8]
    many = replace(whole, classes=tuple(map(str, range(900))))
    assert len(sample_tables(many, seed=0).train) == 4500


def test_the_config_block_and_the_whole_config_are_read_back(tmp_path: Path) -> None:
    found = judge(evidence(RISING, 5000), of_depth(4), 5e-5)
    assert "phases:" in config_block(found)
    file = tmp_path / "x.yaml"
    file.write_text(ready_yaml(spec_of(), found))
    assert file.read_text().startswith("# large and similar: fine-tune-top\n# large: 5,000 training rows")
    assert load_spec(file) == merged(spec_of(), found.config)


def test_the_plot_shows_every_depth(tmp_path: Path) -> None:
    plot_probes(evidence(RISING), "minilm: small and similar", tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    assert all(f">{word}<" in text for word in ("stem", "block 0", "block 3", "head", "LogME"))


@pytest.mark.parametrize(
    ("name", "passes"),
    [("features-best", 1), ("fine-tune-top", 1 + 10 * (3 - 2 * 1 / 3)), ("fine-tune-all", 1 + 10 * 3)],
)
def test_costs_are_the_state_of_a_rank_and_the_passes_it_makes(material: Material, name: str, passes: float) -> None:
    """A frozen prefix takes one forward pass, all else three: one epoch of the head, then ten; the top is two of three
    blocks."""
    found = replace(evidence(RISING, NUM_TRAIN, 3), seconds_a_row=0.01)
    spec = load_spec({**material.text(freeze="none"), "name": "costs"})
    part = choices(found, of_depth(3), 5e-5)[name]
    cost = cost_of(part, spec, found, Topology(1, 2, "cpu"), read_tables(spec.data, 0))
    assert cost.seconds == pytest.approx(passes * NUM_TRAIN * 0.01 / 2)
    model = BertForSequenceClassification(AutoConfig.from_pretrained(material.bert, num_labels=3))
    below = ("bert.embeddings", "bert.encoder.layer.0") if name == "fine-tune-top" else ()
    trained = [p.numel() for key, p in model.named_parameters() if not key.startswith(below)]
    weights = 4 * sum(p.numel() for p in model.parameters())
    if name == "features-best":
        assert cost.state_bytes == weights
    else:  # gradients, Adam's moments and step counts
        buffers = sum(buffer.nbytes for buffer in model.buffers())
        assert cost.state_bytes == weights + 12 * sum(trained) + 4 * len(trained) + buffers


def test_evidence_is_what_rows_and_features_say(
    material: Material, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = material.train.read_text().splitlines()
    kept = {"weather": 51, "food": 25, "music": 10}
    kept_lines = [line for name, num in kept.items() for line in [x for x in lines if x.endswith(f",{name}")][:num]]
    (tmp_path / "uneven.csv").write_text("\n".join([lines[0], *kept_lines]))
    config = material.text(freeze="none", data={"train": str(tmp_path / "uneven.csv")}, features={"pool": "cls"})
    spec = load_spec({**config, "name": "uneven", "output": str(tmp_path)})
    advice = advise(spec)
    found = read_json(advice.folder / "advice.json")["evidence"]
    sizes = ("num_rows", "num_classes", "smallest_class", "median_class", "largest_class", "num_sampled")
    assert [found[key] for key in sizes] == [86, 3, 10, 25, 51, 86]
    assert 0 < 86 * found["seconds_a_row"] < advice.total_s
    places = {probe["depth"]: (probe["word"], probe["position"]) for probe in found["probes"]}
    assert list(places) == ["stem", "block 0", "block 1", "block 2", "head"]
    assert places["block 1"] == ("1", pytest.approx(2 / 3))
    assert [places[depth][1] for depth in ("stem", "block 2", "head")] == [0, 1, 1]
    (store,) = (advice.folder / "features").iterdir()
    shuffled, folds = np.random.default_rng(0).permutation(86), StratifiedKFold(5, shuffle=True, random_state=0)
    for probe in found["probes"]:
        features, labels = stored_features(store, "train", probe["depth"])
        assert probe["logme"] == pytest.approx(logme(features, labels, 3))
        heads = [make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=1000)) for c in GRID]
        features, labels = features[shuffled].astype(np.float64), labels[shuffled]
        accuracy = max(np.mean(cross_val_predict(head, features, labels, cv=folds) == labels) for head in heads)
        assert probe["accuracy"] == pytest.approx(accuracy)
        assert probe["standard_error"] == pytest.approx(np.sqrt(accuracy * (1 - accuracy) / 86))
    other = load_spec({**config, "name": "uneven", "output": str(tmp_path), "strategy": "auto", "features": {}})
    followed = follow_advice(other)
    assert followed.features.pool == "auto"
    assert "goes by" not in capsys.readouterr().out, "it was measured with another pooling"
    assert not store.exists(), "a row can't be timed where features are there"
    assert follow_advice(other) == followed
    assert "goes by" in capsys.readouterr().out
    (advice.folder / "advice.json").write_text('{"verdict": ')
    follow_advice(other)
    assert "goes by" not in capsys.readouterr().out, "what is damaged is measured anew"


def test_auto_on_large_data_trains_the_head_and_then_the_part_worth_training(
    material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"LARGE_ROWS": 40, "LARGE_ROWS_A_CLASS": 10, "SOLVED": 1.1, "ROWS_TO_SEE": 1}.items():
        monkeypatch.setattr(situation, name, value)
    config = material.image(strategy="auto", freeze="none")
    summary = train(load_spec({**config, "name": "large", "output": str(tmp_path)}))
    verdict = read_json(tmp_path / "large-advise" / "advice.json")["verdict"]
    assert (verdict["situation"], verdict["choice"]) == ("large and similar", "fine-tune-top")
    assert load_spec(summary.folder / "config.yaml").strategy is None
    assert [(phase["name"], phase["last_step"]) for phase in summary.phases] == [("head", 3), ("top", 9)]
    before, after = load_file(material.cnn_weights), load_file(summary.folder / "model" / "model.safetensors")
    head, top = ("fc.",), ("layer3.", "layer4.", "fc.")
    assert {name for name in after if not after[name].equal(before[name])} == {n for n in after if n.startswith(top)}
    sizes = {name: p.numel() for name, p in timm.create_model("test_resnet", num_classes=3).named_parameters()}
    of_head, of_top = (sum(n for name, n in sizes.items() if name.startswith(part)) for part in (head, top))
    steps = [row["params/trainable"] for row in read_lines(summary.folder / "metrics.jsonl") if "train/loss" in row]
    assert steps == [of_head] * 3 + [of_top] * 6
