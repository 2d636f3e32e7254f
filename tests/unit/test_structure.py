"""The structure map, family by family, on the meta device: depth, stem, neck and head, and that all adds up."""

import io
import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from rich.console import Console
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertModel,
    PreTrainedModel,
)

from dist_finetune.cli import main
from dist_finetune.data.image_input import ImageInput
from dist_finetune.models.card import ModelCard
from dist_finetune.models.order import visit_order
from dist_finetune.models.structure import Part, Structure, render_structure, structure_of


@dataclass(frozen=True)
class Expected:
    """Modules (or bare parameters) whose tensors make a part, and the modules of the first and last block."""

    depth: int
    first: str
    blocks: tuple[str, str]
    neck: str
    head: str


TEXT = {
    "bert": Expected(
        12, "bert.embeddings", ("bert.encoder.layer.0", "bert.encoder.layer.11"), "bert.pooler", "classifier"
    ),
    "roberta": Expected(
        12, "roberta.embeddings", ("roberta.encoder.layer.0", "roberta.encoder.layer.11"), "", "classifier"
    ),
    "xlm-roberta": Expected(
        12, "roberta.embeddings", ("roberta.encoder.layer.0", "roberta.encoder.layer.11"), "", "classifier"
    ),
    "camembert": Expected(
        12, "roberta.embeddings", ("roberta.encoder.layer.0", "roberta.encoder.layer.11"), "", "classifier"
    ),
    "distilbert": Expected(
        6,
        "distilbert.embeddings",
        ("distilbert.transformer.layer.0", "distilbert.transformer.layer.5"),
        "",
        "pre_classifier classifier",
    ),
    "electra": Expected(
        12,
        "electra.embeddings electra.embeddings_project",
        ("electra.encoder.layer.0", "electra.encoder.layer.11"),
        "",
        "classifier",
    ),
    "deberta": Expected(
        12, "deberta.embeddings", ("deberta.encoder.layer.0", "deberta.encoder.layer.11"), "", "pooler classifier"
    ),
    "deberta-v2": Expected(
        24, "deberta.embeddings", ("deberta.encoder.layer.0", "deberta.encoder.layer.23"), "", "pooler classifier"
    ),
    "mpnet": Expected(
        12,
        "mpnet.embeddings mpnet.encoder.relative_attention_bias",
        ("mpnet.encoder.layer.0", "mpnet.encoder.layer.11"),
        "",
        "classifier",
    ),
    "modernbert": Expected(
        22, "model.embeddings", ("model.layers.0", "model.layers.21"), "model.final_norm", "head classifier"
    ),
    "big_bird": Expected(
        12, "bert.embeddings", ("bert.encoder.layer.0", "bert.encoder.layer.11"), "bert.pooler", "classifier"
    ),
    "xlnet": Expected(
        24,
        "transformer.word_embedding transformer.mask_emb",
        ("transformer.layer.0", "transformer.layer.23"),
        "",
        "sequence_summary logits_proj",
    ),
}
IMAGE = {
    "vit": Expected(12, "vit.embeddings", ("vit.layers.0", "vit.layers.11"), "vit.layernorm", "classifier"),
    "swin": Expected(
        4, "swin.embeddings", ("swin.encoder.layers.0", "swin.encoder.layers.3"), "swin.layernorm", "classifier"
    ),
    "beit": Expected(12, "beit.embeddings", ("beit.layers.0", "beit.layers.11"), "beit.pooler", "classifier"),
    "convnext": Expected(
        4,
        "convnext.embeddings",
        ("convnext.encoder.stages.0", "convnext.encoder.stages.3"),
        "convnext.layernorm",
        "classifier",
    ),
    "convnextv2": Expected(
        4,
        "convnextv2.embeddings",
        ("convnextv2.encoder.stages.0", "convnextv2.encoder.stages.3"),
        "convnextv2.layernorm",
        "classifier",
    ),
    "resnet": Expected(4, "resnet.embedder", ("resnet.encoder.stages.0", "resnet.encoder.stages.3"), "", "classifier"),
    "regnet": Expected(4, "regnet.embedder", ("regnet.encoder.stages.0", "regnet.encoder.stages.3"), "", "classifier"),
    "efficientnet": Expected(
        7,
        "efficientnet.embeddings",
        (
            "efficientnet.encoder.blocks.0 efficientnet.encoder.blocks.1 "
            "efficientnet.encoder.blocks.2 efficientnet.encoder.blocks.3",
            "efficientnet.encoder.blocks.51 efficientnet.encoder.blocks.52 "
            "efficientnet.encoder.blocks.53 efficientnet.encoder.blocks.54",
        ),
        "efficientnet.encoder.top_conv efficientnet.encoder.top_bn",
        "classifier",
    ),
    "mobilenet_v2": Expected(
        6,
        "mobilenet_v2.conv_stem",
        ("mobilenet_v2.layer.0 mobilenet_v2.layer.1", "mobilenet_v2.layer.15"),
        "mobilenet_v2.conv_1x1",
        "classifier",
    ),
}
VGG_BLOCKS = (
    "features.0 features.1 features.3 features.4",
    "features.34 features.35 features.37 features.38 features.40 features.41",
)
TIMM = {
    "resnet50": Expected(4, "conv1 bn1", ("layer1", "layer4"), "", "fc"),
    "resnext50_32x4d": Expected(4, "conv1 bn1", ("layer1", "layer4"), "", "fc"),
    "densenet121": Expected(
        4,
        "features.conv0 features.norm0",
        ("features.denseblock1 features.transition1", "features.denseblock4"),
        "features.norm5",
        "classifier",
    ),
    "vgg16_bn": Expected(5, "", VGG_BLOCKS, "pre_logits", "head.fc"),
    "efficientnet_b0": Expected(7, "conv_stem bn1", ("blocks.0", "blocks.6"), "conv_head bn2", "classifier"),
    "tf_efficientnet_lite0": Expected(7, "conv_stem bn1", ("blocks.0", "blocks.6"), "conv_head bn2", "classifier"),
    "convnext_tiny": Expected(4, "stem", ("stages.0", "stages.3"), "head.norm", "head.fc"),
    "convnext_xxlarge": Expected(4, "stem", ("stages.0", "stages.3"), "head.norm", "head.fc"),
    "regnety_032": Expected(4, "stem", ("s1", "s4"), "", "head.fc"),
    "mobilenetv3_large_100": Expected(7, "conv_stem bn1", ("blocks.0", "blocks.6"), "conv_head", "classifier"),
    "dm_nfnet_f0": Expected(4, "stem", ("stages.0", "stages.3"), "final_conv", "head.fc"),
    "vit_base_patch16_224": Expected(12, "cls_token pos_embed patch_embed", ("blocks.0", "blocks.11"), "norm", "head"),
    "deit_base_distilled_patch16_224": Expected(
        12, "cls_token dist_token pos_embed patch_embed", ("blocks.0", "blocks.11"), "norm", "head head_dist"
    ),
    "swin_tiny_patch4_window7_224": Expected(4, "patch_embed", ("layers.0", "layers.3"), "norm", "head.fc"),
}
TORCHVISION = {
    "resnet50": Expected(4, "conv1 bn1", ("layer1", "layer4"), "", "fc"),
    "vgg16_bn": Expected(5, "", VGG_BLOCKS, "classifier.0 classifier.3", "classifier.6"),
    "densenet121": Expected(
        4,
        "features.conv0 features.norm0",
        ("features.denseblock1 features.transition1", "features.denseblock4"),
        "features.norm5",
        "classifier",
    ),
    "efficientnet_b0": Expected(7, "features.0", ("features.1", "features.7"), "features.8", "classifier.1"),
    "convnext_tiny": Expected(4, "features.0", ("features.1", "features.6 features.7"), "classifier.0", "classifier.2"),
    "mobilenet_v2": Expected(7, "features.0", ("features.1", "features.17"), "features.18", "classifier.1"),
    "mobilenet_v3_large": Expected(
        6,
        "features.0",
        ("features.1", "features.13 features.14 features.15"),
        "features.16 classifier.0",
        "classifier.3",
    ),
    "swin_t": Expected(4, "features.0", ("features.1", "features.6 features.7"), "norm", "head"),
    "vit_b_16": Expected(
        12,
        "class_token conv_proj encoder.pos_embedding",
        ("encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_11"),
        "encoder.ln",
        "heads.head",
    ),
}


def on_meta(family: str, **config: object) -> PreTrainedModel:
    auto = AutoModelForImageClassification if family in IMAGE else AutoModelForSequenceClassification
    with torch.device("meta"):
        return auto.from_config(AutoConfig.for_model(family, **config))


def part(structure: Structure, kind: str) -> Part | None:
    return next((p for p in structure.parts if p.kind == kind), None)


def assert_holds(found: Part | None, paths: str, model: nn.Module) -> None:
    """The part has exactly the parameters below the space-separated `paths`, and as many elements as these; each of the
    paths has some."""
    tensors = dict(model.named_parameters(remove_duplicate=False))
    under = {path: [n for n in tensors if n == path or n.startswith(path + ".")] for path in paths.split()}
    assert all(under.values()), under
    wanted = {name for group in under.values() for name in group}
    assert set(found.parameters if found else ()) == wanted
    assert (found.num_params if found else 0) == sum(p.numel() for p in {tensors[name] for name in wanted})


def assert_expected(model: nn.Module, expected: Expected) -> Structure:
    structure = structure_of(model)
    assert structure.depth == expected.depth
    assert_holds(part(structure, "embeddings"), expected.first, model)
    assert_holds(structure.blocks[0], expected.blocks[0], model)
    assert_holds(structure.blocks[-1], expected.blocks[1], model)
    assert_holds(part(structure, "neck"), expected.neck, model)
    assert_holds(part(structure, "head"), expected.head, model)
    assert part(structure, "other") is None
    assert_adds_up(model, structure)
    return structure


def assert_adds_up(model: nn.Module, structure: Structure) -> None:
    assert structure.num_params == sum(p.numel() for p in model.parameters())
    tensors = [n for p in structure.parts for n in (*p.parameters, *p.buffers)]
    everything = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    assert sorted(tensors) == sorted(name for name, _ in everything)
    assert [p.index for p in structure.blocks] == list(range(structure.depth))


@pytest.mark.parametrize("family", TEXT)
def test_text_family_of_transformers(family: str) -> None:
    structure = assert_expected(on_meta(family), TEXT[family])
    assert structure.parts[0].label == "embeddings"
    assert structure.notes == ()


@pytest.mark.parametrize("family", IMAGE)
def test_image_family_of_transformers(family: str) -> None:
    structure = assert_expected(on_meta(family), IMAGE[family])
    assert structure.parts[0].label == "stem"


@pytest.mark.parametrize("name", TIMM)
def test_timm(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=5)
    assert_expected(model, TIMM[name])


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name: str) -> None:
    with torch.device("meta"):
        model = torchvision.models.get_model(name, num_classes=5)
    assert_expected(model, TORCHVISION[name])


@pytest.mark.parametrize("family", ["xlm", "flaubert"])
def test_blocks_in_four_lists(family: str) -> None:
    config = {"emb_dim": 16, "n_heads": 2, "n_layers": 3, "vocab_size": 64}
    lists = ("attentions", "layer_norm1", "ffns", "layer_norm2")
    blocks = [" ".join(f"transformer.{name}.{i}" for name in lists) for i in range(3)]
    first = "transformer.position_embeddings transformer.embeddings transformer.layer_norm_emb"
    assert_expected(on_meta(family, **config), Expected(3, first, (blocks[0], blocks[-1]), "", "sequence_summary"))


@pytest.mark.parametrize(
    ("family", "depth", "head"),
    [("clip", 12, "classifier"), ("siglip", 12, "classifier"), ("hgnet_v2", 4, "fc"), ("focalnet", 4, "classifier")],
)
def test_image_families_that_name_no_base_or_downsample_behind_a_stage(family: str, depth: int, head: str) -> None:
    with torch.device("meta"):
        model = AutoModelForImageClassification.from_config(AutoConfig.for_model(family))
    structure = structure_of(model)
    assert structure.depth == depth
    assert_holds(part(structure, "head"), head, model)
    assert part(structure, "other") is None
    assert_adds_up(model, structure)


def built(library: str, name: str) -> tuple[nn.Module, ModelCard]:
    """A model on the meta device, and a card with which it is run."""
    text = library == "text"
    with torch.device("meta"):
        if library == "timm":
            model = timm.create_model(name, num_classes=5)
        elif library == "torchvision":
            model = torchvision.models.get_model(name, num_classes=5)
        else:
            model = on_meta(name)
    size = model.default_cfg["input_size"][-1] if library == "timm" else getattr(model, "config", None)
    size = size if isinstance(size, int) else getattr(size, "image_size", 224)
    image = None if text else ImageInput(size=(size, size))
    return model, ModelCard("custom", name, name, "text" if text else "image", image, 64 if text else None, False, 1e-3)


def held_by_part(structure: Structure) -> list[tuple[str, set[str], tuple[str, ...], tuple[str, ...]]]:
    return [(p.label, set(p.modules), p.parameters, p.buffers) for p in structure.parts]


CALLED = {"text": [*TEXT, "albert"], "image": list(IMAGE), "timm": list(TIMM), "torchvision": list(TORCHVISION)}
NOT_RUN_ON_META = {"big_bird", "xlnet"}  # they read values


@pytest.mark.slow
@pytest.mark.parametrize("library", CALLED)
def test_libraries_register_modules_in_the_order_of_their_calls(library: str) -> None:
    """What lets a plan do without a pass for its structure."""
    ran = []
    for name in CALLED[library]:
        model, card = built(library, name)
        visited = visit_order(model, card)
        if visited:
            ran.append(name)
            assert held_by_part(structure_of(model, visited)) == held_by_part(structure_of(model)), name
    assert set(CALLED[library]) - set(ran) <= NOT_RUN_ON_META


def test_relative_embeddings_and_convolution_of_deberta_v3_are_placed() -> None:
    model = on_meta("deberta-v2", relative_attention=True, norm_rel_ebd="layer_norm", conv_kernel_size=3)
    structure = structure_of(model)
    assert structure.part_of("deberta.encoder.rel_embeddings.weight").kind == "embeddings"
    assert structure.part_of("deberta.encoder.LayerNorm.weight").kind == "embeddings"
    assert structure.part_of("deberta.encoder.conv.conv.weight").label == "block 0"
    assert_adds_up(model, structure)


def test_albert_has_twelve_blocks_of_one_set_of_weights() -> None:
    model = on_meta("albert")
    structure = structure_of(model)
    assert structure.depth == 12
    assert structure.shared_blocks == (tuple(range(12)),)
    assert structure.blocks[5].parameters == structure.blocks[0].parameters
    assert structure.blocks[0].num_params > 0
    assert structure.blocks[5].num_params == 0
    assert structure.num_params == sum(p.numel() for p in model.parameters())
    assert structure.part_of("albert.encoder.embedding_hidden_mapping_in.weight").kind == "embeddings"
    assert "one set of weights" in structure.notes[0]
    two_groups = structure_of(on_meta("albert", num_hidden_groups=2, num_hidden_layers=6))
    assert two_groups.shared_blocks == ((0, 1, 2), (3, 4, 5))


def test_a_bert_of_one_layer_with_a_large_vocabulary() -> None:
    config = {"hidden_size": 8, "num_attention_heads": 1, "intermediate_size": 16, "num_hidden_layers": 1}
    structure = structure_of(on_meta("bert", **config))
    assert structure.blocks[0].modules == ("bert.encoder.layer.0",)


def test_tied_decoder_is_counted_once_and_named() -> None:
    with torch.device("meta"):
        model = AutoModelForMaskedLM.from_config(AutoConfig.for_model("bert", num_hidden_layers=2))
    structure = structure_of(model)
    assert ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight") in structure.aliases
    assert structure.part_of("cls.predictions.decoder.weight").label == "head"
    assert_adds_up(model, structure)


def test_a_bare_base_model_has_no_head() -> None:
    with torch.device("meta"):
        structure = structure_of(BertModel(AutoConfig.for_model("bert", num_hidden_layers=2)))
    assert part(structure, "head") is None
    assert "no head was found" in structure.notes


def test_the_second_trunk_of_an_encoder_decoder_is_not_named() -> None:
    model = on_meta("bart", d_model=64, encoder_ffn_dim=64, decoder_ffn_dim=64)
    structure = structure_of(model)
    other = part(structure, "other")
    assert other is not None
    assert other.modules == ("model.encoder",)
    assert any("could not be named" in note for note in structure.notes)
    assert_adds_up(model, structure)


class OwnTransformer(nn.Module):
    """As a user would write it: bare parameters, alternating classes, dropout in front of the head."""

    def __init__(self, shared: bool = False) -> None:
        super().__init__()
        self.tokens = nn.Embedding(50, 16)
        self.cls = nn.Parameter(torch.zeros(1, 1, 16))
        layers = [nn.TransformerEncoderLayer(16, 2, 32) for _ in range(1 if shared else 4)]
        self.stack = nn.ModuleList(layers * 4 if shared else layers)
        self.norm = nn.LayerNorm(16)
        self.drop = nn.Dropout(0.1)
        self.out = nn.Linear(16, 3)


def test_a_model_of_the_users_own() -> None:
    model = OwnTransformer()
    structure = assert_expected(model, Expected(4, "cls tokens", ("stack.0", "stack.3"), "norm", "out"))
    head = part(structure, "head")
    assert head is not None
    assert head.modules == ("drop", "out")  # its dropout must not follow a frozen neck


def test_a_module_used_several_times_is_shared_blocks() -> None:
    structure = structure_of(OwnTransformer(shared=True))
    assert structure.depth == 4
    assert structure.shared_blocks == ((0, 1, 2, 3),)
    assert all(len(group) == 4 for group in structure.aliases)
    assert_adds_up(OwnTransformer(shared=True), structure)


def test_an_own_cnn_is_cut_at_its_poolings() -> None:
    model = nn.Sequential(
        nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3),
            nn.Conv2d(16, 16, 3),
            nn.Conv2d(16, 32, 3, stride=2),
        ),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 2)),
    )
    structure = structure_of(model)
    assert [p.modules[0] for p in structure.blocks] == ["0.0", "0.4", "0.6"]
    head = part(structure, "head")
    assert head is not None
    assert head.parameters == ("1.2.weight", "1.2.bias")
    assert_adds_up(model, structure)


def test_blocks_of_two_classes_that_take_turns_are_numbered_through() -> None:
    model = nn.Module()
    conv = nn.Sequential(nn.Conv1d(8, 8, 3), nn.ReLU())
    model.mix = nn.ModuleList([nn.TransformerEncoderLayer(8, 1, 8), conv, nn.TransformerEncoderLayer(8, 1, 8)])
    model.fc = nn.Linear(8, 2)
    assert structure_of(model).depth == 3


def test_a_get_classifier_that_takes_arguments_is_none_of_timms() -> None:
    class Own(nn.Sequential):
        def get_classifier(self, name: str) -> nn.Module:
            return self.get_submodule(name)

    head = part(structure_of(Own(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))), "head")
    assert head is not None
    assert head.parameters == ("2.weight", "2.bias")


def test_a_model_it_cannot_map_is_said_so() -> None:
    model = nn.Module()
    model.left = nn.Bilinear(4, 4, 4)
    model.right = nn.Bilinear(4, 4, 4)
    structure = structure_of(model)
    assert [p.label for p in structure.parts] == ["other"]
    assert any("no stack of blocks was found" in note for note in structure.notes)
    assert_adds_up(model, structure)


def test_inspect_prints_parts_ties_and_notes() -> None:
    with torch.device("meta"):
        model = AutoModelForMaskedLM.from_config(AutoConfig.for_model("bert", num_hidden_layers=2))
    structure = structure_of(model)
    console = Console(width=160, file=io.StringIO(), markup=False)
    console.print(render_structure(structure))
    text = console.file.getvalue()
    assert "block 1" in text
    assert "bert.encoder.layer.1" in text
    assert f"{structure.num_params:,}" in text
    assert "one tensor: bert.embeddings.word_embeddings.weight = cls.predictions.decoder.weight" in text


def test_the_command_inspect_shows_a_models_parts(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["inspect", "timm:test_resnet"])
    assert ended.value.code == 0
    rows = [re.split(" {2,}", line) for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows] == ["part", "stem", *(f"block {i}" for i in range(4)), "head", "all"]
    assert rows[2][1:3] == ["layer1", "6"]
    assert rows[6][1:4] == ["fc", "2", "194"]  # 96 features, two classes


def test_inspect_needs_no_published_weights(capsys: pytest.CaptureFixture[str]) -> None:
    assert not timm.get_pretrained_cfg("cspresnet50d").has_weights
    with pytest.raises(SystemExit) as ended:
        main(["inspect", "timm:cspresnet50d"])
    assert ended.value.code == 0
    assert "block 3" in capsys.readouterr().out


OWN_CODE = """
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


class Config(PretrainedConfig):
    model_type = "own"


class Model(PreTrainedModel):
    config_class = Config

    def __init__(self, config):
        super().__init__(config)
        self.words = nn.Embedding(10, 8)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2))
        self.classifier = nn.Linear(8, config.num_labels)
        self.post_init()

    def forward(self, input_ids, attention_mask=None):
        hidden = self.words(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.classifier(hidden[:, 0])
"""


def test_inspect_runs_code_of_a_repository_where_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "code.py").write_text(OWN_CODE)
    own = {"AutoConfig": "code.Config", "AutoModelForSequenceClassification": "code.Model"}
    (folder / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": own}))
    for asked, code in (([], 2), (["--trust-remote-code"], 0)):
        with pytest.raises(SystemExit) as ended:
            main(["inspect", str(folder), *asked])
        assert ended.value.code == code
    out, err = capsys.readouterr()
    assert "`inspect` takes --trust-remote-code" in err
    rows = [re.split(" {2,}", line)[:3] for line in out.splitlines()]
    assert rows[1:4] == [["embeddings", "words", "1"], ["block 0", "layers.0", "2"], ["block 1", "layers.1", "2"]]
