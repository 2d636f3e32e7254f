"""Notes on valid freezes: their numbers are checked against what the advised freeze really does."""

from typing import Any

import timm
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from dist_finetune.freeze import Manifest, compile_freeze
from dist_finetune.lint import first_trainable_part, lint
from dist_finetune.models.structure import structure_of
from dist_finetune.spec import FreezeSpec


def bert() -> nn.Module:
    config = BertConfig(num_hidden_layers=6, hidden_size=16, num_attention_heads=2, intermediate_size=32, vocab_size=60)
    with torch.device("meta"):
        return BertForSequenceClassification(config)


def resnet() -> nn.Module:
    with torch.device("meta"):
        return timm.create_model("resnet18", num_classes=4)


def compiled(model: nn.Module, **freeze: Any) -> Manifest:
    return compile_freeze(FreezeSpec.model_validate(freeze), structure_of(model), model)


def notes_of(model: nn.Module, checkpointing: bool = False, **freeze: Any) -> dict[str, str]:
    notes = lint(compiled(model, **freeze), structure_of(model), model, gradient_checkpointing=checkpointing)
    assert len({note.code for note in notes}) == len(notes)
    return {note.code: note.message for note in notes}


def test_the_classic_recipe_says_what_freezing_the_rest_would_save() -> None:
    text = notes_of(bert(), layers="1,2,3")["trains-below-frozen"]
    advised = compiled(bert(), embeddings=True, layers="0-3")
    more = advised.num_frozen - compiled(bert(), layers="1,2,3").num_frozen
    assert text.startswith("embeddings and block 0 train below frozen blocks 1-3")
    assert 'embeddings: true, layers: "0-3"' in text
    assert f"{more:,} more parameters" in text
    assert "end at block 4, after 2 of 6 blocks" in text


def test_embeddings_frozen_and_block_0_forgotten() -> None:
    text = notes_of(bert(), embeddings=True, layers="1,2,3")["trains-below-frozen"]
    assert text.startswith("block 0 trains below frozen blocks 1-3")
    assert "runs down to block 0" in text


def test_embeddings_forgotten_below_all_blocks() -> None:
    text = notes_of(bert(), layers="all")["trains-below-frozen"]
    assert text.startswith("embeddings trains below frozen blocks 0-5")
    assert "end at the neck or head, after 0 of 6 blocks" in text


def test_a_gap_between_frozen_blocks() -> None:
    text = notes_of(bert(), embeddings=True, layers="0,1,4")["trains-below-frozen"]
    assert text.startswith("blocks 2-3 train below frozen block 4")


def test_a_frozen_prefix_has_nothing_but_where_backward_ends() -> None:
    model = bert()
    notes = notes_of(model, embeddings=True, layers="0-3")
    assert list(notes) == ["first-trainable"]
    below = compiled(model, embeddings=True, layers="0-3").num_frozen
    assert "first trainable part: block 4" in notes["first-trainable"]
    assert f"{below:,} of {structure_of(model).num_params:,} parameters" in notes["first-trainable"]
    assert notes_of(model) == {}


def test_where_backward_ends_is_not_said_while_unnamed_parts_train() -> None:
    sizes = {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "vocab_size": 64}
    with torch.device("meta"):
        config = AutoConfig.for_model("bart", encoder_layers=4, decoder_layers=6, **sizes)
        notes = notes_of(AutoModelForSequenceClassification.from_config(config), layers="0-3")
    assert "end at block" not in notes["trains-below-frozen"]
    assert "not known: parts that could not be named train (other)" in notes["trains-below-frozen"]
    assert "backward is taken to run through the whole model" in notes["first-trainable"]


def test_norms_frozen_everywhere_is_not_a_frozen_block() -> None:
    assert "trains-below-frozen" not in notes_of(bert(), rule="norms")


def test_first_trainable_part() -> None:
    model = bert()
    structure = structure_of(model)
    assert first_trainable_part(compiled(model, layers="1,2,3"), structure).label == "embeddings"
    assert first_trainable_part(compiled(model, embeddings=True, layers="0-2"), structure).label == "block 3"
    assert first_trainable_part(compiled(model, rule="backbone"), structure).label == "head"
    assert first_trainable_part(compiled(model, rule="bias-only"), structure).label == "embeddings"


def test_frozen_head() -> None:
    assert "34 of 34 parameters of the head" in notes_of(bert(), patterns=["classifier"])["frozen-head"]
    assert "frozen-head" not in notes_of(bert(), rule="backbone")


def test_batchnorm_that_keeps_moving() -> None:
    by_mode = notes_of(resnet(), embeddings=True, layers="0", mode="train")["batchnorm-trains"]
    assert "5 BatchNorm layers in stem, block 0" in by_mode
    assert "freeze.mode is train" in by_mode
    by_bias = notes_of(resnet(), embeddings=True, layers="0", **{"except": ["*.bias"]})["batchnorm-trains"]
    assert "5 BatchNorm layers" in by_bias
    assert "first: bn1" in by_bias
    assert "because their own weight or bias trains (" in by_bias
    assert "batchnorm-trains" not in notes_of(resnet(), embeddings=True, layers="0")
    block = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=False), nn.Conv2d(8, 8, 3))
    bare = notes_of(nn.Sequential(block, nn.Linear(8, 2)), patterns=["0.0.*"])["batchnorm-trains"]
    assert "because they have no weight that could be frozen (first: 0.1)" in bare


def test_gradient_checkpointing_that_cannot_help() -> None:
    assert "checkpointing-without-effect" in notes_of(bert(), checkpointing=True, rule="backbone")
    assert "checkpointing-without-effect" not in notes_of(bert(), checkpointing=True, layers="0")
