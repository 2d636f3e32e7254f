"""The freeze language, the manifest, and that what is frozen does not move, on small real models."""

import json
import re
import time
from typing import Any

import pytest
import timm
import torch
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from dist_finetune.errors import TrainingError, UserError
from dist_finetune.freeze import Manifest, apply_freeze, check_frozen_flags, compile_freeze, train_mode
from dist_finetune.freeze_rules import match_names, ranges
from dist_finetune.gradients import require_gradients
from dist_finetune.models.structure import structure_of
from dist_finetune.spec import FreezeSpec, LaunchSpec
from dist_finetune.world import join_world

SIZES = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 60}


def bert(depth: int = 12) -> BertForSequenceClassification:
    with torch.device("meta"):
        return BertForSequenceClassification(BertConfig(num_hidden_layers=depth, **SIZES))


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("resnet18", num_classes=4)


def manifest_of(model: nn.Module, **freeze: Any) -> Manifest:
    return compile_freeze(FreezeSpec.model_validate(freeze), structure_of(model), model)


def problem_of(model: nn.Module, **freeze: Any) -> str:
    with pytest.raises(UserError) as caught:
        manifest_of(model, **freeze)
    return str(caught.value)


def frozen_blocks(manifest: Manifest) -> list[int]:
    """Numbers of the BERT blocks that are frozen entirely; a partly frozen one fails."""
    flags: dict[int, set[bool]] = {}
    for record in manifest.records:
        if record.part.startswith("block"):
            flags.setdefault(int(record.part.split()[1]), set()).add(record.frozen)
    assert all(len(found) == 1 for found in flags.values())
    return [i for i, found in flags.items() if found == {True}]


@pytest.mark.parametrize(
    ("layers", "blocks"),
    [
        ("1,2,3", [1, 2, 3]),
        ("0-5,9", [0, 1, 2, 3, 4, 5, 9]),
        ("-1", [11]),
        ("-3--1", [9, 10, 11]),
        ("8 - -1", [8, 9, 10, 11]),
        ("first 6", [0, 1, 2, 3, 4, 5]),
        ("last 2", [10, 11]),
        ("50%", [0, 1, 2, 3, 4, 5]),
        ("30%", [0, 1, 2]),
        ("100%", list(range(12))),
        ("all", list(range(12))),
        ("first 1, last 1", [0, 11]),
        (3, [3]),
        ([1, 10], [1, 10]),
    ],
)
def test_layers(layers: Any, blocks: list[int]) -> None:
    manifest = manifest_of(bert(), layers=layers)
    assert frozen_blocks(manifest) == blocks
    assert {r.part for r in manifest.records if r.frozen} == {f"block {i}" for i in blocks}


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ("12", ["block 12 is out of range", "12 blocks, numbers 0 to 11", "-12 to -1"]),
        ("0-15", ["block 15 is out of range", "numbers 0 to 11"]),
        ("-13", ["block -13 is out of range"]),
        ("first 13", ["'first 13' is out of range", "12 blocks"]),
        ("last 0", ["out of range"]),
        ("5-2", ["empty", "starts at block 5 and ends at block 2"]),
        ("5%", ["less than one block"]),
        ("120%", ["more than all"]),
        ("frist 6", ["'frist 6' names no blocks", "first 6"]),
        ("1,,2", ["'' names no blocks"]),
        ("1.5", ["names no blocks"]),
    ],
)
def test_wrong_layers(layers: str, words: list[str]) -> None:
    message = problem_of(bert(), layers=layers)
    assert all(word in message for word in words), message


NAMES = [
    "bert.embeddings.LayerNorm.weight",
    "bert.encoder.layer.1.attention.output.LayerNorm.weight",
    "bert.encoder.layer.1.output.dense.weight",
    "bert.encoder.layer.10.output.dense.weight",
    "bert.encoder.layer.10.output.dense.bias",
    "classifier.bias",
]


def test_many_wildcards_take_no_longer_than_few() -> None:
    names = [".".join(["layer"] * 12 + [str(i), "weight"]) for i in range(2000)]
    started = time.perf_counter()
    assert match_names("**.layer." * 8 + "bias", names) == []
    assert match_names("**.layer." * 8 + "7.**", names) == [names[7]]
    assert time.perf_counter() - started < 2


def test_bias_only_is_refused_where_the_head_alone_would_train() -> None:
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 2}
    with torch.device("meta"):
        config = ModernBertConfig(**sizes)
        model = ModernBertForSequenceClassification(config)
    message = problem_of(model, rule="bias-only")
    assert "no bias outside its head" in message
    assert "`freeze: backbone` does the same" in message
    way_out = re.search(r"except: (\[.*?\])", message)
    assert way_out
    trained = manifest_of(model, rule="backbone", **{"except": json.loads(way_out[1])}).trainable
    assert {name.split(".")[0] for name in trained} == {"model", "head", "classifier"}
    assert all("norm" in name for name in trained if name.startswith("model."))


@pytest.mark.parametrize(
    ("pattern", "taken"),
    [
        ("*.LayerNorm.*", [0, 1]),
        ("bert.encoder.layer.1", [1, 2]),
        ("bert.encoder.layer.1.*", [1, 2]),
        ("*.layer.1", [1, 2]),
        ("*.layer.1?", [3, 4]),
        ("*.layer.[0-9]", [1, 2]),
        ("*.layer.*.output", [2, 3, 4]),
        ("*.layer.**.output", [1, 2, 3, 4]),
        ("*.bias", [4, 5]),
        ("*.b*s", [4, 5]),
        ("classifier", [5]),
        ("**.classifier", [5]),
        ("**", [0, 1, 2, 3, 4, 5]),
        ("*", [0, 1, 2, 3, 4, 5]),
        ("*.classifier", []),
        ("bert.encoder.layer.1.output.dense.weight.more", []),
        ("layer.1", []),
        ("*.ayer.1", []),
    ],
)
def test_patterns_are_globs_on_whole_segments(pattern: str, taken: list[int]) -> None:
    assert match_names(pattern, NAMES) == [NAMES[i] for i in taken]


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("layer.1", ["matches no parameter", "'*.layer.1'"]),
        ("*.LayrNorm.*", ["'*.LayerNorm.*'"]),
        ("bert.encodr", ["bert.encoder"]),
        ("bert.encoder.layer.12", ["matches no parameter", "bert.encoder.layer.1"]),
    ],
)
def test_pattern_that_takes_nothing_names_the_nearest(pattern: str, words: list[str]) -> None:
    message = problem_of(bert(), patterns=[pattern])
    assert all(word in message for word in words), message
    assert "except" in problem_of(bert(), layers="0", **{"except": [pattern]})


def test_embeddings_and_first_blocks() -> None:
    manifest = manifest_of(bert(), embeddings=True, layers="0-3")
    frozen = {r.part for r in manifest.records if r.frozen}
    assert frozen == {"embeddings", "block 0", "block 1", "block 2", "block 3"}
    assert manifest.num_frozen + manifest.num_trainable == sum(p.numel() for p in bert().parameters())
    assert manifest.held_modules == ("bert.embeddings", *(f"bert.encoder.layer.{i}" for i in range(4)))


def test_except_wins_and_every_rule_reports() -> None:
    manifest = manifest_of(bert(2), layers="0", patterns=["*.LayerNorm.*"], **{"except": ["*.bias"]})
    by_name = {record.name: record for record in manifest.records}
    assert by_name["bert.encoder.layer.0.output.dense.weight"].rule == 'layers "0"'
    assert by_name["bert.encoder.layer.1.output.LayerNorm.weight"].rule == "pattern *.LayerNorm.*"
    excepted = by_name["bert.encoder.layer.0.output.dense.bias"]
    assert (excepted.frozen, excepted.rule) == (False, "except *.bias")
    assert by_name["classifier.bias"].rule is None  # nothing froze it, so the exception decided nothing
    assert not any(r.frozen for r in manifest.records if r.name.endswith("bias"))
    reports = {report.rule: report for report in manifest.rules}
    assert list(reports) == ['layers "0"', "pattern *.LayerNorm.*", "except *.bias"]
    assert reports["pattern *.LayerNorm.*"].num_tensors == 10  # embeddings and two in each block: weight and bias
    assert reports["pattern *.LayerNorm.*"].num_params == 10 * 16
    assert reports['layers "0"'].num_tensors == 16


def test_backbone_trains_the_head_alone() -> None:
    assert manifest_of(bert(), rule="backbone").trainable == ("classifier.weight", "classifier.bias")
    with torch.device("meta"):
        roberta = RobertaForSequenceClassification(RobertaConfig(num_hidden_layers=2, **SIZES))
        vit = timm.create_model("test_vit", num_classes=3)
    trainable = manifest_of(roberta, rule="backbone").trainable
    assert {name.split(".")[0] for name in trainable} == {"classifier"}
    assert len(trainable) == 4
    manifest = manifest_of(vit, rule="backbone")
    assert manifest.trainable == ("head.weight", "head.bias")
    assert "pos_embed" in manifest.frozen
    assert "pos_drop" in manifest.held_modules
    assert "head_drop" not in manifest.held_modules  # the head's dropout stays active


def test_norms_leaves_the_norm_of_the_head() -> None:
    manifest = manifest_of(resnet(), rule="norms")
    assert len(manifest.frozen) == 40
    assert all("bn" in name or "downsample.1" in name for name in manifest.frozen)
    with torch.device("meta"):
        lm = BertForMaskedLM(BertConfig(num_hidden_layers=2, **SIZES))
    names = manifest_of(lm, rule="norms").frozen
    assert len(names) == 10
    assert not any(name.startswith("cls.") for name in names)


def test_bias_only_trains_biases_and_the_head() -> None:
    trainable = manifest_of(bert(2), rule="bias-only").trainable
    assert "classifier.weight" in trainable
    assert all(name.endswith(".bias") for name in trainable if name != "classifier.weight")
    biases = [name for name, _ in bert(2).named_parameters() if name.endswith(".bias")]
    assert [name for name in trainable if name.endswith(".bias")] == biases


def test_all_but_last_leaves_neck_and_head() -> None:
    manifest = manifest_of(bert(), rule="all-but-last 2")
    assert frozen_blocks(manifest) == list(range(10))
    parts = {r.part for r in manifest.records if not r.frozen and r.kind == "parameter"}
    assert parts == {"block 10", "block 11", "neck", "head"}
    assert "0 to 12" in problem_of(bert(), rule="all-but-last 13")


def test_word_combines_with_other_keys() -> None:
    manifest = manifest_of(bert(), rule="backbone", **{"except": ["bert.encoder.layer.11", "bert.pooler"]})
    assert frozen_blocks(manifest) == list(range(11))
    assert {r.part for r in manifest.records if not r.frozen and r.kind == "parameter"} == {"block 11", "neck", "head"}


def test_a_head_is_frozen_only_by_name() -> None:
    manifest = manifest_of(bert(2), embeddings=True, layers="all", patterns=["classifier.weight"])
    assert "classifier.weight" in manifest.frozen
    assert "classifier.bias" in manifest.trainable


def test_nothing_left_to_train_points_to_backbone_and_features() -> None:
    message = problem_of(bert(2), patterns=["**"])
    assert "nothing is left to train" in message
    assert "freeze: backbone" in message
    assert "dist-finetune features" in message


def test_all_problems_at_once() -> None:
    message = problem_of(bert(), rule="all-but-last 13", layers="40", patterns=["*.nothere"])
    assert message.startswith("freeze: 3 problems")
    assert "'all-but-last 13' is out of range" in message
    assert "out of range" in message
    assert "*.nothere" in message


def test_except_without_effect_is_refused() -> None:
    assert "has no effect" in problem_of(bert(), layers="0", **{"except": ["classifier"]})
    assert "has no effect" in problem_of(bert(), **{"except": ["classifier"]})


def test_tied_tensor_frozen_under_one_name_is_refused() -> None:
    with torch.device("meta"):
        lm = BertForMaskedLM(BertConfig(num_hidden_layers=2, **SIZES))
    embedding, decoder = "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"
    message = problem_of(lm, rule="backbone")
    assert embedding in message
    assert decoder in message
    # Both ways out that it names work.
    assert embedding in manifest_of(lm, rule="backbone", patterns=[decoder]).frozen
    assert embedding in manifest_of(lm, rule="backbone", **{"except": [embedding]}).trainable
    excepted = problem_of(lm, rule="backbone", patterns=[decoder], **{"except": [decoder]})
    assert f"'except {decoder}' lets it train" in excepted


def test_partial_freeze_of_shared_blocks_is_refused_with_the_reason() -> None:
    with torch.device("meta"):
        albert = AlbertForSequenceClassification(AlbertConfig(num_hidden_layers=6, embedding_size=8, **SIZES))
    message = problem_of(albert, layers="0-2")
    assert "run one and the same set of weights" in message
    assert 'layers: "0-5"' in message
    assert "one and the same" in problem_of(albert, rule="all-but-last 1")
    manifest = manifest_of(albert, embeddings=True, layers="all")
    assert {name.split(".")[1] for name in manifest.trainable if name.startswith("albert")} == {"pooler"}


def test_models_without_blocks_embeddings_or_head_say_so() -> None:
    with torch.device("meta"):
        vgg = timm.create_model("vgg11", num_classes=3)
        base = BertModel(BertConfig(num_hidden_layers=2, **SIZES))
    unknown = nn.Module()
    unknown.left, unknown.right = nn.Bilinear(2, 2, 2), nn.Bilinear(2, 2, 2)
    assert "no embeddings or stem" in problem_of(vgg, embeddings=True)
    assert "blocks 0-4" in problem_of(vgg, embeddings=True)
    assert "no head was found" in problem_of(base, rule="backbone")
    assert "no numbered blocks" in problem_of(unknown, layers="0")
    assert manifest_of(unknown, patterns=["left"]).trainable == ("right.weight", "right.bias")


def test_digest_depends_on_what_is_frozen_and_not_on_how_it_is_written() -> None:
    assert manifest_of(bert(), layers="0-3").digest == manifest_of(bert(), layers="first 4").digest
    assert manifest_of(bert(), layers="0-3").digest != manifest_of(bert(), layers="0-2").digest
    assert manifest_of(bert(11), layers="0-3").digest != manifest_of(bert(12), layers="0-3").digest


def test_manifest_is_json_in_the_order_of_the_model() -> None:
    model = resnet()
    manifest = manifest_of(model, embeddings=True, layers="0")
    plain = json.loads(json.dumps(manifest.to_json()))
    names = [n for n, _ in model.named_parameters()] + [n for n, _ in model.named_buffers()]
    assert [tensor["name"] for tensor in plain["tensors"]] == names
    frozen = [t["num_elements"] for t in plain["tensors"] if t["frozen"] and t["kind"] == "parameter"]
    assert plain["num_frozen"] == sum(frozen) > 0
    assert set(names) == set(model.state_dict())


def step(model: nn.Module, manifest: Manifest) -> dict[str, torch.Tensor]:
    """The state before three training steps of everything that requires a gradient, weight decay and momentum on."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        train_mode(model, manifest)
        model(torch.randn(4, 3, 32, 32)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return before


def test_frozen_tensors_and_batchnorm_do_not_move_and_the_rest_does() -> None:
    model = resnet()
    manifest = manifest_of(model, embeddings=True, layers="0,1")
    apply_freeze(model, manifest)
    check_frozen_flags(model, manifest)
    before, after = step(model, manifest), model.state_dict()
    held = {*manifest.frozen, *manifest.frozen_buffers}
    assert {"bn1.running_mean", "layer2.0.bn1.num_batches_tracked", "conv1.weight"} <= held
    assert {name for name in after if torch.equal(before[name], after[name])} == held


def test_mode_train_lets_frozen_batchnorm_move_and_promises_nothing_about_it() -> None:
    model = resnet()
    manifest = manifest_of(model, embeddings=True, layers="0", mode="train")
    apply_freeze(model, manifest)
    before, after = step(model, manifest), model.state_dict()
    assert manifest.frozen_buffers == ()
    assert not torch.equal(before["bn1.running_mean"], after["bn1.running_mean"])
    assert torch.equal(before["bn1.weight"], after["bn1.weight"])


def test_batchnorm_without_parameters_is_held_with_its_part() -> None:
    model = nn.Sequential()
    model.append(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), nn.Dropout(0.5), nn.MaxPool2d(2)))
    model[0].extend([nn.Conv2d(4, 4, 3), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3)])
    model.append(nn.Sequential(nn.Flatten(), nn.Linear(4 * 4 * 4, 2)))
    manifest = manifest_of(model, layers="0")
    assert {"0.1", "0.2"} <= set(manifest.held_modules)
    assert set(manifest.frozen_buffers) == {"0.1.running_mean", "0.1.running_var", "0.1.num_batches_tracked"}
    train_mode(model, manifest)
    assert [module.training for module in model[0]][:3] == [False, False, False]
    assert model[0][4].training


def test_dropout_of_frozen_blocks_is_off_and_of_others_on() -> None:
    model = BertForSequenceClassification(BertConfig(num_hidden_layers=2, hidden_dropout_prob=0.5, **SIZES))
    manifest = manifest_of(model, embeddings=True, layers="0")
    train_mode(model, manifest)
    ids = torch.randint(0, 60, (2, 7))
    states = [model.bert(ids, output_hidden_states=True).hidden_states for _ in range(2)]
    assert torch.equal(states[0][1], states[1][1])
    assert not torch.equal(states[0][2], states[1][2])


def test_apply_freeze_thaws_too_and_drops_stale_gradients() -> None:
    model = resnet()
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    apply_freeze(model, manifest_of(model, rule="backbone"))
    assert model.conv1.weight.grad is None
    assert model.fc.weight.grad is not None
    apply_freeze(model, manifest_of(model, layers="0"))
    assert model.conv1.weight.requires_grad
    assert not model.layer1[0].conv1.weight.requires_grad


def test_another_model_is_refused_before_anything_changes() -> None:
    manifest = manifest_of(resnet(), layers="0")
    other = timm.create_model("resnet18", num_classes=5)
    with pytest.raises(TrainingError, match=r"fc\.weight: shape \[5, 512\], planned \[4, 512\]"):
        apply_freeze(other, manifest)
    assert all(parameter.requires_grad for parameter in other.parameters())
    with pytest.raises(TrainingError, match="not in the model"):
        apply_freeze(nn.Linear(2, 2), manifest)


def test_flags_reset_by_later_surgery_are_noticed() -> None:
    model = BertForSequenceClassification(BertConfig(num_hidden_layers=2, **SIZES))
    manifest = manifest_of(model, embeddings=True, layers="0")
    apply_freeze(model, manifest)
    model.resize_token_embeddings(70)
    model.bert.embeddings.word_embeddings.weight.requires_grad_(True)
    with pytest.raises(TrainingError, match=r"word_embeddings\.weight: planned frozen, would train"):
        check_frozen_flags(model, manifest)


def test_ranges() -> None:
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"


class PartlyUsed(nn.Module):
    """Images go through `body.0` alone, of whose second layer `tied` has the weight too."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Linear(2, 2) for _ in range(4)]
        self.body = nn.ModuleList([nn.ModuleList(layers[:2]), nn.ModuleList(layers[2:])])
        self.spare = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        self.tied = nn.Linear(2, 2)
        self.tied.weight = layers[1].weight

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        first, second = self.body[0]
        return nn.functional.linear(first(pixels), second.weight)


def test_patterns_that_freeze_what_is_outside_the_loss_take_all_of_it() -> None:
    model, batch = PartlyUsed(), {"inputs": torch.ones(3, 2), "labels": torch.tensor([0, 1, 0])}
    with join_world(LaunchSpec()), pytest.raises(UserError) as refused:
        require_gradients(model, batch, "classification", 2, "phases.1.freeze.patterns")  # type: ignore[arg-type]
    told = (
        "10 trainable parameters have no part in the loss: body.0.1.bias, body.1.0.bias, body.1.0.weight, body.1.1.bias"
    )
    assert told in str(refused.value)
    patterns = str(refused.value).rpartition("phases.1.freeze.patterns=")[2]
    assert patterns == "[body.0.1.bias, body.1.*, spare.*, tied.bias]"
    names = [name for name, _ in model.named_parameters()]
    taken = {name for pattern in patterns.strip("[]").split(", ") for name in match_names(pattern, names)}
    assert len(taken) == 10
    for name in taken:
        model.get_parameter(name).requires_grad_(False)
    with join_world(LaunchSpec()):
        require_gradients(model, batch, "classification", 2, "freeze.patterns")  # type: ignore[arg-type]
