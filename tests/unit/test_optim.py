"""Parameter groups of exactly what trains, and the learning rate as a function of the step."""

from itertools import pairwise

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from dist_finetune.errors import UserError
from dist_finetune.freeze import Manifest, apply_freeze, compile_freeze
from dist_finetune.models.structure import Structure, structure_of
from dist_finetune.optim import GroupPlan, build_optimizer, lr_factor, pattern_rates, plan_groups, set_lr
from dist_finetune.spec import FreezeSpec, TrainSpec


@pytest.fixture(scope="module")
def bert() -> BertForSequenceClassification:
    config = BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16,
    )  # fmt: skip
    return BertForSequenceClassification(config)


@pytest.fixture(scope="module")
def structure(bert: BertForSequenceClassification) -> Structure:
    return structure_of(bert)


def groups_of(
    bert: BertForSequenceClassification, structure: Structure, freeze: FreezeSpec, train: TrainSpec
) -> tuple[Manifest, tuple[GroupPlan, ...]]:
    manifest = compile_freeze(freeze, structure, bert)
    return manifest, plan_groups(manifest, structure, train, 1e-4, dict.fromkeys(manifest.trainable, 0))


FREEZES = [
    FreezeSpec(),
    FreezeSpec(rule="backbone"),
    FreezeSpec(rule="norms"),
    FreezeSpec(rule="bias-only"),
    FreezeSpec(embeddings=True, layers="0-2"),
    FreezeSpec(embeddings=True, layers="all", except_=("*.LayerNorm.bias",)),
]
TRAINS = [
    TrainSpec(),
    TrainSpec(head_lr=1e-3),
    TrainSpec(head_lr=1e-3, layer_decay=0.9),
    TrainSpec(weight_decay=0),
    TrainSpec(head_lr=1e-3, pattern_lr={"*.LayerNorm.*": 3e-4, "classifier.bias": 2e-3}),
]


@pytest.mark.parametrize("train", TRAINS, ids=["plain", "head", "decay", "no-weight-decay", "patterns"])
@pytest.mark.parametrize("freeze", FREEZES, ids=["none", "backbone", "norms", "bias-only", "layers", "except"])
def test_groups_hold_each_trainable_parameter_once_and_none_is_empty(
    bert: BertForSequenceClassification, structure: Structure, freeze: FreezeSpec, train: TrainSpec
) -> None:
    manifest, groups = groups_of(bert, structure, freeze, train)
    names = [name for group in groups for name in group.names]
    assert sorted(names) == sorted(manifest.trainable)
    assert all(group.names for group in groups)
    assert sum(group.num_params for group in groups) == manifest.num_trainable
    assert len({(group.lr, group.weight_decay, group.since_phase) for group in groups}) == len(groups)
    apply_freeze(bert, manifest)
    optimizer = build_optimizer(bert, groups)
    assert all(group["fused"] for group in optimizer.param_groups)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in bert.parameters() if p.requires_grad}
    assert len(held) == len(manifest.trainable)


def test_only_matrices_decay(bert: BertForSequenceClassification, structure: Structure) -> None:
    _, groups = groups_of(bert, structure, FreezeSpec(), TrainSpec(weight_decay=0.05))
    decay = {name: group.weight_decay for group in groups for name in group.names}
    assert len(decay) == len(list(bert.parameters()))
    for name, parameter in bert.named_parameters():
        assert decay[name] == (0.05 if parameter.ndim > 1 else 0.0), name


@pytest.mark.parametrize("layers", ["0", "0-2"])
def test_rates_by_depth_do_not_depend_on_what_is_frozen(
    bert: BertForSequenceClassification, structure: Structure, layers: str
) -> None:
    train = TrainSpec(head_lr=3e-3, layer_decay=0.5)
    freeze = FreezeSpec(embeddings=True, layers=layers)
    lr_full, lr_frozen = (
        {name: group.lr for group in groups_of(bert, structure, spec, train)[1] for name in group.names}
        for spec in (FreezeSpec(), freeze)
    )
    assert lr_full["classifier.weight"] == 3e-3
    assert lr_full["bert.encoder.layer.3.output.dense.weight"] == pytest.approx(1e-4 * 0.5)
    assert lr_full["bert.encoder.layer.0.output.dense.weight"] == pytest.approx(1e-4 * 0.5**4)
    assert lr_full["bert.embeddings.word_embeddings.weight"] == pytest.approx(1e-4 * 0.5**5)
    assert lr_frozen == {name: lr_full[name] for name in lr_frozen}
    assert len(lr_frozen) < len(lr_full)


def test_a_rate_by_pattern_wins_and_takes_nothing_else(
    bert: BertForSequenceClassification, structure: Structure
) -> None:
    patterns = {"*.layer.1.**.LayerNorm.*": 3e-4, "classifier.bias": 2e-3}
    train = TrainSpec(head_lr=1e-3, layer_decay=0.5)
    plain, stated = (
        {name: group.lr for group in groups_of(bert, structure, FreezeSpec(), t)[1] for name in group.names}
        for t in (train, train.model_copy(update={"pattern_lr": patterns}))
    )
    changed = {name: rate for name, rate in stated.items() if rate != plain[name]}
    norms = ["bert.encoder.layer.1.attention.output.LayerNorm", "bert.encoder.layer.1.output.LayerNorm"]
    assert changed == {"classifier.bias": 2e-3, **{f"{n}.{k}": 3e-4 for n in norms for k in ("weight", "bias")}}


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        ({"*.LayrNorm.*": 1e-4}, ["'*.LayrNorm.*' matches no parameter", "Did you mean '*.LayerNorm.*'"]),
        ({"classifier": 1e-4, "*.bias": 1e-3}, ["'classifier' and '*.bias' both take classifier.bias"]),
    ],
)
def test_wrong_patterns_of_rates(patterns: dict[str, float], words: list[str]) -> None:
    names = ["bert.LayerNorm.weight", "bert.LayerNorm.bias", "classifier.weight", "classifier.bias"]
    with pytest.raises(UserError) as refused:
        pattern_rates(patterns, names)
    assert all(word in str(refused.value) for word in words)


def test_the_rate_moves_the_weights_in_proportion(bert: BertForSequenceClassification, structure: Structure) -> None:
    """Rates are real `lr` values of the groups: Adam's first step is the rate itself, up to weight decay."""
    train = TrainSpec(head_lr=1e-2, layer_decay=0.5, weight_decay=0)
    manifest, groups = groups_of(bert, structure, FreezeSpec(embeddings=True), train)
    apply_freeze(bert, manifest)
    optimizer = build_optimizer(bert, groups)
    assert set_lr(optimizer.param_groups, 0.1) == pytest.approx(1e-3)
    named = dict(bert.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in named.items()}
    for parameter in named.values():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    optimizer.zero_grad()
    rates = {name: group.lr for group in groups for name in group.names}
    for name, parameter in named.items():
        step = (before[name] - parameter).detach()
        torch.testing.assert_close(step, torch.full_like(step, 0.1 * rates.get(name, 0)), rtol=1e-3, atol=2e-7)


def test_schedules_warm_up_and_come_down() -> None:
    def curve(schedule: str) -> list[float]:
        return [lr_factor(step, 20, 4, schedule) for step in range(20)]

    for schedule in ("linear", "cosine", "constant"):
        assert curve(schedule)[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert curve("linear")[4:] == pytest.approx([1 - i / 16 for i in range(16)])
    assert curve("cosine")[12] == pytest.approx(0.5)
    assert all(a > b for a, b in pairwise(curve("cosine")[4:]))
    assert set(curve("constant")[4:]) == {1.0}
    assert all(factor > 0 for name in ("linear", "cosine") for factor in curve(name))
    assert lr_factor(0, 1, 0, "linear") == 1.0
