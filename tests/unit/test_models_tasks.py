"""Heads for every task: built, initialised, exported with what they are for, and found again by it."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, BertConfig, BertModel, RobertaConfig, RobertaTokenizer

from dist_finetune.errors import UserError
from dist_finetune.models.export import export_model, load_exported
from dist_finetune.models.load import load_model
from dist_finetune.models.sources import describe_model, for_task, forward_logits, load_tokenizer
from dist_finetune.models.structure import structure_of
from dist_finetune.spec import ModelSpec
from dist_finetune.tasks.names import TASKS, TaskName

CLASSES: dict[TaskName, tuple[str, ...]] = {
    "classification": ("a", "b", "c"),
    "multilabel": ("a", "b", "c"),
    "regression": ("score",),
    "token-classification": ("a", "b", "c"),
}
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
TEXT = {"input_ids": torch.tensor([[1, 2, 3, 4]])}
IMAGE = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=50, max_position_embeddings=32, **TINY)).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def exported(name: object, task: TaskName, folder: Path, size: int | None = None, **options: str) -> nn.Module:
    """A model for `task` as training would leave it, written to `folder`."""
    spec = ModelSpec(name=str(name), **options)
    card = for_task(describe_model(spec, size), task)
    model, provenance = load_model(card, spec, CLASSES[task], seed=0)
    assert not provenance.head_kept
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    export_model(card, spec, CLASSES[task], model.state_dict(), folder)
    return model.eval()


def check_found_again(folder: Path, model: nn.Module, task: TaskName, inputs: object) -> None:
    """It says its task and outputs, gives its logits, and is gone on with by a run of that task and no other."""
    again, card, classes = load_exported(folder)
    assert (card.task, classes) == (task, CLASSES[task])
    logits = forward_logits(model, inputs)
    assert torch.equal(forward_logits(again, inputs), logits)
    assert logits.shape[-1] == len(classes)
    for other in TASKS:
        if other == "token-classification" and card.modality == "image":
            continue
        spec = ModelSpec(name=str(folder))
        _, provenance = load_model(for_task(describe_model(spec), other), spec, CLASSES[task], seed=9)
        assert provenance.head_kept == (other == task), other
        assert bool(provenance.initialized) == (other != task)


@pytest.mark.parametrize("task", TASKS)
def test_heads_of_a_bert(bert: Path, tmp_path: Path, task: TaskName) -> None:
    model = exported(bert, task, tmp_path / "out")
    head = structure_of(model).of_kind("head")
    assert head is not None
    assert "classifier.weight" in head.parameters
    is_tagger = task == "token-classification"
    assert forward_logits(model, TEXT).shape == ((1, 4, 3) if is_tagger else (1, len(CLASSES[task])))
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.architectures == ["BertForTokenClassification" if is_tagger else "BertForSequenceClassification"]
    problem = {"multilabel": "multi_label_classification", "regression": "regression"}
    assert config.problem_type == (None if is_tagger else problem.get(task, "single_label_classification"))
    assert (config.num_labels, config.id2label) == (len(CLASSES[task]), dict(enumerate(CLASSES[task])))
    check_found_again(tmp_path / "out", model, task, TEXT)


@pytest.mark.parametrize("task", ["multilabel", "regression"])
@pytest.mark.parametrize("name", ["timm:test_resnet", "torchvision:squeezenet1_1", "user_models_tasks:picture"])
def test_heads_of_image_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, task: TaskName) -> None:
    (tmp_path / "user_models_tasks.py").write_text(
        "from torch import nn\n"
        "def picture(num_classes):\n"
        "    return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, num_classes))\n"
    )
    monkeypatch.chdir(tmp_path)
    model = exported(name, task, tmp_path / "out", 64, weights="none")
    assert forward_logits(model, IMAGE).shape == (1, len(CLASSES[task]))
    check_found_again(tmp_path / "out", model, task, IMAGE)
    if name.startswith("timm"):
        config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
        assert config["problem_type"] == ("regression" if task == "regression" else "multi_label_classification")


def test_models_that_tag_no_words(tmp_path: Path) -> None:
    card = describe_model(ModelSpec(name="timm:test_resnet", weights="none"))
    with pytest.raises(UserError, match="tags words, and timm:test_resnet reads images"):
        for_task(card, "token-classification")
    AutoConfig.for_model("ctrl").save_pretrained(tmp_path)
    card = describe_model(ModelSpec(name=str(tmp_path), weights="none"))
    with pytest.raises(UserError, match="transformers has no ctrl that tags words"):
        for_task(card, "token-classification")


def test_byte_level_tokenizers_read_words_from_their_space_on(tmp_path: Path) -> None:
    vocabulary = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 4, "a": 5, "\u0120": 6, "\u0120a": 7}
    RobertaTokenizer(vocab=vocabulary, merges=[("\u0120", "a")]).save_pretrained(tmp_path)
    RobertaConfig(vocab_size=8, **TINY).save_pretrained(tmp_path)
    card = for_task(describe_model(ModelSpec(name=str(tmp_path), weights="none")), "token-classification")
    tokenizer = load_tokenizer(card)
    assert tokenizer(["a", "a"], is_split_into_words=True)["input_ids"] == [0, 7, 7, 2]
