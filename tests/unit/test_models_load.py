"""Weights: the right tensors in fp32, a head that follows the seed alone, files that don't fit refused by name."""

import hashlib
import math
import os
import pickle
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    RobertaConfig,
    RobertaForMaskedLM,
    SiglipConfig,
    SiglipModel,
)
from transformers.integrations import HfDeepSpeedConfig

from dist_finetune import load_once
from dist_finetune.errors import UserError
from dist_finetune.models.card import Provenance
from dist_finetune.models.demo import efficientnet_file
from dist_finetune.models.load import load_model
from dist_finetune.models.sources import describe_model
from dist_finetune.models.weights import files_sha256, read_weights, write_weights
from dist_finetune.spec import LaunchSpec, ModelSpec
from dist_finetune.world import join_world

CLASSES = ("cat", "dog", "owl")
TINY = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 60,
}  # fmt: skip


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """A folder with a bare tiny BERT."""
    torch.manual_seed(7)
    BertModel(BertConfig(**TINY)).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def load(name: Any, classes: tuple[str, ...] = CLASSES, seed: int = 0, **options: Any) -> tuple[nn.Module, Provenance]:
    spec = ModelSpec(name=str(name), **options)
    return load_model(describe_model(spec), spec, classes, seed)


def refusal(name: Any, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        load(name, **options)
    return str(caught.value)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[n], b[n]) for n in a)


def test_the_body_is_the_sources_and_the_head_follows_the_seed(bert: Path) -> None:
    source = load_file(bert / "model.safetensors")
    torch.manual_seed(1)
    outer = torch.get_rng_state()
    model, provenance = load(bert, seed=3)
    assert torch.equal(torch.get_rng_state(), outer), "loading used the caller's random numbers"
    state = model.state_dict()
    assert all(torch.equal(state[f"bert.{name}"], tensor) for name, tensor in source.items())
    assert provenance.initialized == ("classifier.weight", "classifier.bias")
    assert model.training
    torch.manual_seed(99)
    assert same(state, load(bert, seed=3)[0].state_dict())
    other = load(bert, seed=4)[0].state_dict()
    assert [n for n in state if not torch.equal(state[n], other[n])] == ["classifier.weight"]


def test_the_new_head_of_a_real_model_has_the_statistics_of_its_family() -> None:
    model, provenance = load("demo:minilm")
    head: Any = model.get_submodule("classifier")
    assert head.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not head.bias.any()
    assert provenance.sha256 == hashlib.sha256((Path(describe_model(ModelSpec(name="demo:minilm")).location) /
                                                "model.safetensors").read_bytes()).hexdigest()  # fmt: skip


def test_a_half_precision_checkpoint_is_loaded_in_fp32(bert: Path) -> None:
    state = {n: t.half() for n, t in load_file(bert / "model.safetensors").items()}
    save_file(state, bert / "model.safetensors", {"format": "pt"})
    BertConfig(**TINY, dtype="float16").save_pretrained(bert)
    for weights in ("pretrained", "none"):
        model, _ = load(bert, weights=weights)
        assert {t.dtype for t in model.parameters()} == {torch.float32}
    assert torch.equal(load(bert)[0].state_dict()["bert.pooler.dense.weight"], state["pooler.dense.weight"].float())


def test_a_classifier_keeps_its_head_for_the_same_classes_only(tmp_path: Path) -> None:
    torch.manual_seed(7)
    source = BertForSequenceClassification(BertConfig(**TINY, id2label=dict(enumerate(CLASSES))))
    source.save_pretrained(tmp_path)
    model, provenance = load(tmp_path)
    assert provenance.head_kept
    assert provenance.initialized == ()
    assert same(model.state_dict(), source.state_dict())
    for classes in (("a", "b", "c"), ("owl", "dog", "cat"), ("cat", "dog")):
        model, provenance = load(tmp_path, classes)
        new: Any = model.get_submodule("classifier")
        assert not provenance.head_kept
        assert "classifier.weight" in provenance.initialized
        assert new.weight.shape == (len(classes), 32)
        assert not torch.equal(new.weight, source.classifier.weight[: len(classes)])
        assert new.weight.std().item() == pytest.approx(0.02, rel=0.3)
        assert same(model.state_dict(), load(tmp_path, classes)[0].state_dict())


def test_a_live_zero3_config_and_fsdp_variables_change_nothing(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = load(bert)[0].state_dict()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "1")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "1")
    alive = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    for weights in ("pretrained", "none"):
        model, _ = load(bert, weights=weights)
        assert not any(hasattr(p, "ds_id") for p in model.parameters())
        assert all(p.numel() for p in model.parameters())
        if weights == "pretrained":
            assert same(model.state_dict(), plain)
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "1"
    assert alive.is_zero3()


def test_weights_none_is_random_from_the_seed_and_says_so() -> None:
    for name in ("timm:test_resnet", "torchvision:mobilenet_v3_small"):
        model, provenance = load(name, seed=1, weights="none")
        assert same(model.state_dict(), load(name, seed=1, weights="none")[0].state_dict())
        assert provenance.sha256 != load(name, seed=2, weights="none")[1].sha256
        assert provenance.initialized == tuple(model.state_dict())


def test_the_demo_cnn_holds_the_files_tensors_under_timms_names() -> None:
    model, provenance = load("demo:efficientnet-lite0", seed=5)
    state, source = model.state_dict(), list(read_weights(efficientnet_file()).values())
    assert len(source) == len(state) == 296
    pairs = list(zip(state, source, strict=True))
    assert all(torch.equal(state[name], tensor) for name, tensor in pairs[:-2])
    assert provenance.initialized == ("classifier.weight", "classifier.bias")
    assert provenance.sha256.startswith("57934424")


@pytest.mark.parametrize("name", ["timm:tf_efficientnet_lite0", "torchvision:efficientnet_b0"])
def test_a_new_classifier_of_a_cnn_has_no_opinion_at_first(tmp_path: Path, name: str) -> None:
    file = tmp_path / "weights.safetensors"
    write_weights(load(name, tuple("abcdefg"), weights="none")[0].state_dict(), file)
    model, _ = load(name, weights=str(file))
    images = torch.randn(4, 3, 64, 64)
    loss = nn.functional.cross_entropy(model(images), torch.tensor([0, 1, 2, 0]))
    assert loss.item() == pytest.approx(math.log(len(CLASSES)))
    loss.backward()
    head = model.get_classifier() if "timm" in name else model.classifier[-1]
    assert all(parameter.grad.abs().sum() > 0 for parameter in head.parameters())


def test_a_new_convolution_as_head_is_not_dead(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    write_weights(load("torchvision:squeezenet1_1", tuple("abcdefg"), weights="none")[0].state_dict(), file)
    heads = [
        load("torchvision:squeezenet1_1", weights=str(file), seed=seed)[0].classifier[1].weight for seed in (1, 1, 2)
    ]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert heads[0].std() > 0.01


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("name", ["timm:test_resnet", "torchvision:mobilenet_v3_small"])
def test_a_weight_file_fills_all_but_the_head(tmp_path: Path, name: str, suffix: str) -> None:
    source = load(name, tuple("abcdefg"), weights="none", seed=8)[0].state_dict()
    file = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": {f"module.{n}": t for n, t in source.items()}}, file)
    else:
        write_weights(source, file)
    model, provenance = load(name, weights=str(file))
    different = [n for n, t in model.state_dict().items() if not torch.equal(t, source[n])]
    assert len(different) == 2
    assert set(different) == set(provenance.initialized)
    assert provenance.files == (file.name,)
    body = {n: t for n, t in source.items() if n not in different}
    first, *rest = body
    write_weights({"stranger": body[first], **{n: body[n] for n in rest}}, tmp_path / "other.safetensors")
    message = refusal(name, weights=str(tmp_path / "other.safetensors"))
    assert f"1 missing from the file: {first}" in message
    assert "1 not in the model: stranger" in message
    write_weights({**body, first: body[first][:2].clone()}, tmp_path / "short.safetensors")
    assert f"1 of another shape: {first} ((2, " in refusal(name, weights=str(tmp_path / "short.safetensors"))


def test_a_weight_file_for_a_bert_may_be_bare_but_not_incomplete(bert: Path, tmp_path: Path) -> None:
    source = load_file(bert / "model.safetensors")
    config_only = tmp_path / "config_only"
    BertConfig(**TINY).save_pretrained(config_only)
    assert "holds a config but no weights" in refusal(config_only)
    model, provenance = load(config_only, weights=str(bert / "model.safetensors"))
    assert same(model.state_dict(), load(bert)[0].state_dict())
    assert provenance.sha256 == files_sha256([bert / "model.safetensors"])
    del source["encoder.layer.1.output.dense.weight"]
    source["encoder.layer.1.output.LayerNorm.weight"] = torch.ones(5)
    save_file(source, tmp_path / "cut.safetensors", {"format": "pt"})
    message = refusal(config_only, weights=str(tmp_path / "cut.safetensors"))
    assert "1 missing from the file: bert.encoder.layer.1.output.dense.weight" in message
    assert "bert.encoder.layer.1.output.LayerNorm.weight" in message
    save_file(source, bert / "model.safetensors", {"format": "pt"})
    assert "bert.encoder.layer.1.output.dense.weight" in refusal(bert)


def test_a_classifier_without_a_base_model_inside_may_not_be_incomplete_either(tmp_path: Path) -> None:
    sizes = {**TINY, "image_size": 32, "patch_size": 8}
    texts = {**TINY, "projection_size": TINY["hidden_size"]}
    SiglipModel(SiglipConfig(vision_config=sizes, text_config=texts)).save_pretrained(tmp_path)
    model, provenance = load(tmp_path)
    assert provenance.initialized == ("classifier.weight", "classifier.bias")
    source = load_file(tmp_path / "model.safetensors")
    assert torch.equal(model.state_dict()[lacks := "vision_model.encoder.layers.1.mlp.fc1.weight"], source.pop(lacks))
    save_file(source, tmp_path / "model.safetensors", {"format": "pt"})
    assert f"1 missing from the file: {lacks}" in refusal(tmp_path)


def test_a_masked_language_model_becomes_a_classifier(tmp_path: Path) -> None:
    RobertaForMaskedLM(RobertaConfig(**TINY)).save_pretrained(tmp_path)
    _, provenance = load(tmp_path)
    assert set(provenance.initialized) == {
        f"classifier.{a}.{b}" for a in ("dense", "out_proj") for b in ("weight", "bias")
    }


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("distilbert", {"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 64, "vocab_size": 60}),
        ("deberta-v2", {**TINY, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
        ("xlnet", {"d_model": 32, "n_layer": 1, "n_head": 2, "d_inner": 64, "vocab_size": 60}),
        ("modernbert", {**TINY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1}),
        ("vit", {**TINY, "image_size": 32, "patch_size": 8}),
        ("resnet", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}),
    ],
)
def test_a_bare_model_of_each_family_gives_its_whole_body(tmp_path: Path, kind: str, fields: dict[str, Any]) -> None:
    source = AutoModel.from_config(AutoConfig.for_model(kind, **fields))
    source.save_pretrained(tmp_path)
    model, provenance = load(tmp_path)
    prefix = f"{model.base_model_prefix}."
    body = {n.removeprefix(prefix): t for n, t in model.state_dict().items() if n.startswith(prefix)}
    given = source.state_dict()
    assert len(body) >= 10
    assert all(torch.equal(body[name], given[name]) for name in body)
    assert not any(name.startswith(prefix) for name in provenance.initialized)


def test_files_that_could_run_code_or_are_damaged_are_refused(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(tmp_path / "was_run"),))

    torch.save({"weight": Harm()}, tmp_path / "harm.pth")
    (tmp_path / "harm.bin").write_bytes(pickle.dumps(Harm()))
    for name in ("harm.pth", "harm.bin"):
        assert "could run code" in refusal("timm:test_resnet", weights=str(tmp_path / name))
    assert not (tmp_path / "was_run").exists()
    whole = tmp_path / "whole.safetensors"
    write_weights({"weight": torch.ones(100)}, whole)
    (tmp_path / "cut.safetensors").write_bytes(whole.read_bytes()[:100])
    torch.save({"weight": torch.ones(100)}, tmp_path / "whole.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:300])
    (tmp_path / "empty.pth").touch()
    for name in ("cut.safetensors", "cut.pth", "empty.pth"):
        assert name in refusal("timm:test_resnet", weights=str(tmp_path / name))


def test_a_damaged_folder_is_named(bert: Path) -> None:
    file = bert / "model.safetensors"
    file.write_bytes(file.read_bytes()[:2000])
    assert str(bert) in refusal(bert)


def test_as_many_classes_as_the_source_by_chance_still_get_a_new_head(tmp_path: Path) -> None:
    source = timm.create_model("test_resnet", num_classes=3)
    write_weights(source.state_dict(), tmp_path / "w.safetensors")
    model, provenance = load("timm:test_resnet", weights=str(tmp_path / "w.safetensors"))
    assert provenance.initialized == ("fc.weight", "fc.bias")
    assert not torch.equal(model.state_dict()["fc.weight"], source.state_dict()["fc.weight"])


def test_files_that_a_rank_does_not_see_are_changes_that_it_makes_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in two containers of one host name: what one wrote to its /tmp is not in the other's."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # which joining sets
    model = nn.Linear(2, 2)
    (tmp_path / "0").write_bytes(bytes(16))  # of two tensors one

    def change() -> list[str]:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(1.0)
        return ["weight", "bias"]

    with join_world(LaunchSpec()) as world:
        second = replace(world, rank=1, local_rank=1, world_size=2, local_world_size=2)
        offer = (socket.gethostname(), tmp_path, ("weight", "bias"))
        monkeypatch.setattr(load_once, "gather_objects", lambda own: [offer, own])
        load_once.change_once_a_node(model, change, second)
    assert all(bool((parameter == 1.0).all()) for parameter in model.parameters())
