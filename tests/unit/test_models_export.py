"""What leaves is whole: the library's own loader reads it, bit for bit, and so do we, to evaluate or to train on."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    ConvNextConfig,
    ConvNextImageProcessor,
    ViTConfig,
)

from dist_finetune.data.images import evaluation_pixels, normalised
from dist_finetune.errors import UserError
from dist_finetune.models.card import ModelCard
from dist_finetune.models.export import export_model, load_exported
from dist_finetune.models.load import load_model
from dist_finetune.models.sources import describe_model, forward_logits, load_tokenizer
from dist_finetune.models.weights import write_weights
from dist_finetune.spec import ModelSpec

CLASSES = ("cat", "dög", "owl")
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def exported(folder: Path, name: Any, size: int | None = None, **options: Any) -> tuple[nn.Module, ModelCard]:
    """A model as training would leave it (other weights than any source's), written to `folder`."""
    spec = ModelSpec(name=str(name), **options)
    card = describe_model(spec, size)
    model, _ = load_model(card, spec, CLASSES, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    tokenizer = load_tokenizer(card) if card.modality == "text" else None
    export_model(card, spec, CLASSES, model.state_dict(), folder, tokenizer)
    return model.eval(), card


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def check_ours(folder: Path, model: nn.Module, card: ModelCard, inputs: Any) -> None:
    """`load_exported` and training on from the folder give back the same model, classes and input."""
    again, found, classes = load_exported(folder)
    assert classes == CLASSES
    assert (found.image, found.max_length, found.default_lr) == (card.image, card.max_length, card.default_lr)
    assert same(again.state_dict(), model.state_dict())
    assert torch.equal(forward_logits(again, inputs), forward_logits(model, inputs))
    spec = ModelSpec(name=str(folder))
    _, kept = load_model(found, spec, CLASSES, seed=9)
    assert (kept.head_kept, kept.initialized) == (True, ())
    _, new = load_model(found, spec, ("cat", "dog", "owl"), seed=9)
    assert not new.head_kept
    assert len(new.initialized) >= 1


def test_a_bert_leaves_as_a_folder_for_from_pretrained(tmp_path: Path) -> None:
    model, card = exported(tmp_path, "demo:minilm", dropout=0.0)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    tokens = AutoTokenizer.from_pretrained(tmp_path)(["a text", "another one"], padding=True, return_tensors="pt")
    assert same(again.state_dict(), model.state_dict())
    assert set(load_file(tmp_path / "model.safetensors")) == set(model.state_dict())
    assert again.config.id2label == dict(enumerate(CLASSES))
    assert torch.equal(again(**tokens).logits, forward_logits(model, dict(tokens)))
    check_ours(tmp_path, model, card, dict(tokens))


@pytest.mark.parametrize("kind", ["convnext", "vit", "vit without a processor"])
def test_an_image_model_of_transformers_leaves_with_its_processor(tmp_path: Path, kind: str) -> None:
    source = tmp_path / "source"
    if kind == "convnext":
        ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2).save_pretrained(source)
        ConvNextImageProcessor(size={"shortest_edge": 64}, crop_pct=0.875).save_pretrained(source)
    else:
        ViTConfig(**TINY, image_size=32, patch_size=8).save_pretrained(source)
        processor = {"size": {"height": 32, "width": 32}, "image_processor_type": "ViTImageProcessor"}
        if kind == "vit":
            (source / "preprocessor_config.json").write_text(json.dumps(processor))
    AutoModelForImageClassification.from_config(AutoConfig.from_pretrained(source)).save_pretrained(source)
    size = 48 if kind == "convnext" else None
    model, card = exported(tmp_path / "model", source, size)
    assert card.image is not None
    images = torch.rand(2, 3, *card.image.size)
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "model").eval()
    assert torch.equal(again(images).logits, forward_logits(model, images))
    found = AutoImageProcessor.from_pretrained(tmp_path / "model")
    assert found.size
    picture = Image.effect_noise(card.image.size, 60).convert("RGB")
    if kind == "vit without a processor":
        ours = normalised(evaluation_pixels(picture, card.image), card.image)
        torch.testing.assert_close(found(picture, return_tensors="pt")["pixel_values"][0], ours)
    check_ours(tmp_path / "model", model, card, images)


@pytest.mark.parametrize(
    ("name", "size", "options"),
    [
        ("demo:efficientnet-lite0", 64, {}),
        ("timm:test_convnext", None, {"weights": "none"}),
        ("timm:test_vit", 64, {"weights": "none"}),
    ],
)
def test_a_timm_model_leaves_as_a_folder_for_create_model(
    tmp_path: Path, name: str, size: int | None, options: dict[str, str]
) -> None:
    model, card = exported(tmp_path, name, size, **options)
    assert card.image is not None
    images = torch.rand(2, 3, *card.image.size)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert same(again.state_dict(), model.state_dict())
    assert torch.equal(again(images), model(images))
    config = timm.data.resolve_data_config(model=again)
    assert tuple(config["input_size"]) == (3, *card.image.size)
    assert (tuple(config["mean"]), config["crop_pct"]) == (card.image.mean, card.image.crop_fraction)
    assert tuple(again.pretrained_cfg["label_names"]) == CLASSES
    # Trained on from, it leaves as well as it came.
    spec = ModelSpec(name=str(tmp_path))
    second = tmp_path / "second"
    export_model(describe_model(spec), spec, CLASSES, model.state_dict(), second)
    assert same(timm.create_model(f"local-dir:{second}", pretrained=True).state_dict(), model.state_dict())
    check_ours(tmp_path, model, card, images)


@pytest.mark.parametrize("architecture", ["mobilenet_v3_small", "googlenet"])
def test_a_torchvision_model_leaves_with_what_it_takes_to_load_it(tmp_path: Path, architecture: str) -> None:
    model, card = exported(tmp_path, f"torchvision:{architecture}", 64, weights="none")
    images = torch.rand(2, 3, 64, 64)
    said = json.loads((tmp_path / "dist_finetune_model.json").read_text(encoding="utf-8"))
    quiet = {"init_weights": False} if architecture == "googlenet" else {}
    again = torchvision.models.get_model(said["built_by"], **said["built_with"], **quiet).eval()
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(again(images), model(images))
    check_ours(tmp_path, model, card, images)


def test_models_born_in_tensorflow_take_their_own_normalisation() -> None:
    image = describe_model(ModelSpec(name="torchvision:googlenet")).image
    assert image is not None
    pixels = torch.rand(2, 3, 64, 64)
    published = torchvision.models.googlenet(transform_input=True, aux_logits=False, init_weights=False).eval()
    ours = torchvision.models.googlenet(transform_input=False, aux_logits=False, init_weights=False).eval()
    ours.load_state_dict(published.state_dict())
    preset = torchvision.models.GoogLeNet_Weights.DEFAULT.transforms()
    expected = published(torchvision.transforms.functional.normalize(pixels, preset.mean, preset.std))
    found = ours(torchvision.transforms.functional.normalize(pixels, image.mean, image.std))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_model_of_the_users_own_leaves_and_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "user_models_b.py").write_text(
        "from torch import nn\n"
        "def net(num_classes):\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, num_classes))\n"
        "net.image_size = 8\n"
    )
    monkeypatch.chdir(tmp_path)
    model, card = exported(tmp_path / "model", "user_models_b:net")
    check_ours(tmp_path / "model", model, card, torch.rand(2, 3, 8, 8))


def test_half_precision_and_shared_tensors_are_written_bit_for_bit(tmp_path: Path) -> None:
    base = torch.randn(4, 6)
    state = {
        "a": base.bfloat16(), "b": base.half(), "c": base.t(), "d": base[0], "e": base, "f": torch.tensor(3), "g": base,
    }  # fmt: skip
    write_weights(state, tmp_path / "w.safetensors")
    assert same(dict(sorted(load_file(tmp_path / "w.safetensors").items())), state)
    spec = ModelSpec(name="demo:minilm")
    card = describe_model(spec)
    model, _ = load_model(card, spec, CLASSES, seed=0)
    half = {name: t.bfloat16() if t.is_floating_point() else t for name, t in model.state_dict().items()}
    export_model(card, spec, CLASSES, half, tmp_path / "half")
    written = load_file(tmp_path / "half" / "model.safetensors")
    assert same(dict(sorted(written.items())), dict(sorted(half.items())))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("library", ["transformers", "timm"])
def test_a_source_in_half_precision_leaves_in_fp32_with_its_every_value(
    tmp_path: Path, library: str, dtype: torch.dtype
) -> None:
    """Rounded back, what is frozen is the source's to the bit; what trained keeps digits that the source's type lacks.
    In a file of both types it would lose them: `from_pretrained` loads all of a file in one."""
    source, folder = tmp_path / "source", tmp_path / "model"
    if library == "transformers":
        BertModel(BertConfig(**TINY, vocab_size=60)).to(dtype).save_pretrained(source)
        spec, prefix = ModelSpec(name=str(source)), "bert."
    else:
        source.mkdir()
        write_weights(timm.create_model("test_resnet").to(dtype).state_dict(), source / "model.safetensors")
        spec, prefix = ModelSpec(name="timm:test_resnet", weights=str(source / "model.safetensors")), ""
    card = describe_model(spec)
    model, provenance = load_model(card, spec, CLASSES, seed=0)
    trained = {name: tensor + 1 / 3 for name, tensor in model.state_dict().items() if name in provenance.initialized}
    export_model(card, spec, CLASSES, model.state_dict() | trained, folder)
    if library == "transformers":
        again = AutoModelForSequenceClassification.from_pretrained(folder).state_dict()
    else:
        again = timm.create_model(f"local-dir:{folder}", pretrained=True).state_dict()
    assert same({name: again.pop(name) for name in trained}, trained)
    half = load_file(source / "model.safetensors")
    given = {name: half[name.removeprefix(prefix)] for name in again}
    assert same(again, {name: t.float() if t.is_floating_point() else t for name, t in given.items()})
    assert same({name: tensor.to(given[name].dtype) for name, tensor in again.items()}, given)


def test_what_is_no_finished_classifier_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        load_exported(tmp_path / "absent")
    folder = Path(describe_model(ModelSpec(name="demo:minilm")).location)
    with pytest.raises(UserError, match=r"not a finished classifier.*classifier\.weight"):
        load_exported(folder)
