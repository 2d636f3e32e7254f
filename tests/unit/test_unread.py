"""The last block of classifiers that read the first token: it computes no other, with the same logits and gradients."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoModelForTokenClassification

from dist_finetune.cache.cut import ACTIVATION, find_cut, make_tail, run_prefix
from dist_finetune.models.sources import forward_logits
from dist_finetune.models.unread import FAMILIES, can_skip_unread, skip_unread
from dist_finetune.recompute import recomputed

SMALL = {
    "vocab_size": 100, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 192,
    "max_position_embeddings": 40, "embedding_size": 48, "pronunciation_vocab_size": 20, "shape_vocab_size": 20,
    "pad_token_id": 0, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0,
}  # fmt: skip
MODEL_TYPES = {
    "Bert": "bert", "Camembert": "camembert", "Data2VecText": "data2vec-text", "Electra": "electra", "Ernie": "ernie",
    "RoCBert": "roc_bert", "Roberta": "roberta", "RobertaPreLayerNorm": "roberta-prelayernorm",
    "XLMRoberta": "xlm-roberta", "XLMRobertaXL": "xlm-roberta-xl",
}  # fmt: skip


def classifier(model_type: str, auto=AutoModelForSequenceClassification, attention="sdpa", **more) -> Any:
    config = AutoConfig.for_model(model_type, **{**SMALL, **more})
    torch.manual_seed(0)
    return auto.from_config(config, attn_implementation=attention, dtype=torch.float32).train()


def texts() -> dict[str, torch.Tensor]:
    """Three texts, two of them with padding."""
    ids = torch.arange(3 * 8).view(3, 8) % 90 + 5
    mask = torch.ones_like(ids)
    mask[0, 5:] = mask[1, 3:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def with_gradients(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    logits = forward_logits(model, texts())
    logits.square().sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_alike(model: nn.Module, whole: nn.Module) -> None:
    (found, found_gradients), (logits, gradients) = with_gradients(model), with_gradients(whole)
    torch.testing.assert_close(found, logits, rtol=1e-5, atol=1e-6)
    assert found_gradients.keys() == gradients.keys()
    largest = max(gradient.abs().max().item() for gradient in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(found_gradients[name], gradient, rtol=1e-4, atol=1e-6 * largest, msg=name)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_gives_the_same_logits_and_gradients(family: str, attention: str) -> None:
    whole = classifier(MODEL_TYPES[family], attention=attention)
    assert type(whole).__name__ == f"{family}ForSequenceClassification"
    assert can_skip_unread(whole)
    first = copy.deepcopy(whole)
    skip_unread(first)
    assert_alike(first, whole)


def test_it_does_so_where_its_activations_are_recomputed() -> None:
    whole, first = classifier("bert"), classifier("bert")
    skip_unread(first)
    block = first.bert.encoder.layer[-1]
    block.forward = recomputed(block.forward)
    assert_alike(first, whole)


def test_it_computes_a_sixth_of_the_last_block() -> None:
    model = classifier("bert")
    block, hidden = model.bert.encoder.layer[-1], torch.rand(3, 64, 48)

    def flops() -> int:
        with FlopCounterMode(display=False) as counter:
            block(hidden)
        return counter.get_total_flops()

    whole = flops()
    skip_unread(model)
    assert 2 / 12 * 0.8 < flops() / whole < 2 / 12 * 1.2  # keys and values: 2 of 12 matrices of H x H; texts are short


def test_models_without_data_tell_and_nothing_of_theirs_is_changed() -> None:
    with torch.device("meta"):
        model = classifier("bert").eval()
    torch.manual_seed(1)
    expected = torch.rand(4)
    torch.manual_seed(1)
    assert can_skip_unread(model)
    assert torch.equal(torch.rand(4), expected), "random numbers are left alone"
    assert not any(module.training or module._forward_pre_hooks for module in model.modules())
    skip_unread(model)
    assert forward_logits(model, {"input_ids": texts()["input_ids"].to("meta")}).shape == (3, 2)


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(lambda: classifier("bert", auto=AutoModelForTokenClassification), id="tagger"),
        pytest.param(lambda: classifier("bert", is_decoder=True), id="decoder"),
        pytest.param(lambda: classifier("bert", num_hidden_layers=0), id="without blocks"),
        pytest.param(lambda: classifier("bert", chunk_size_feed_forward=2), id="chunks of two tokens"),
        pytest.param(lambda: classifier("distilbert"), id="distilbert"),
        pytest.param(lambda: nn.Linear(2, 2), id="not of transformers"),
    ],
)
def test_other_models_compute_all_tokens(model) -> None:
    assert not can_skip_unread(model())


def test_a_class_of_the_same_name_from_elsewhere_computes_all_tokens() -> None:
    model = classifier("bert")
    kind = type(model)
    model.__class__ = type(kind.__name__, (kind,), {"__module__": "transformers_modules.own"})
    assert not can_skip_unread(model)


def test_blocks_under_another_name_compute_all_tokens() -> None:
    model = classifier("bert")
    model.bert.encoder.layers = model.bert.encoder.layer
    del model.bert.encoder.layer
    assert not can_skip_unread(model)


@pytest.mark.parametrize("changed", ["gone", "other arguments", "other numbers"])
def test_the_cross_attention_of_another_version_is_not_trusted(changed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.bert import modeling_bert

    own = modeling_bert.BertCrossAttention.forward
    if changed == "gone":
        monkeypatch.delattr(modeling_bert, "BertCrossAttention")
    elif changed == "other arguments":
        monkeypatch.setattr(modeling_bert.BertCrossAttention, "forward", lambda self, hidden: own(self, hidden, hidden))
    else:
        monkeypatch.setattr(
            modeling_bert.BertCrossAttention, "forward", lambda self, one, text, mask: own(self, one, text[:, 1:], mask)
        )
    assert not can_skip_unread(classifier("bert"))


@pytest.mark.parametrize("trainable", ["layer.1.intermediate", "pooler"])
def test_what_trains_above_a_cut_in_the_last_block_is_fed_with_one_position(trainable: str) -> None:
    """As where attention is frozen and cached, and the feed-forward network above it trains."""
    model = classifier("bert")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable in name and "attention" not in name)
    for module in model.modules():
        module.training = any(parameter.requires_grad for parameter in module.parameters())
    expected = forward_logits(model, texts())
    skip_unread(model)
    cut = find_cut(model, texts())
    activation = run_prefix(model, cut, texts()).clone()
    assert activation.shape[:2] == (3, 1)
    make_tail(model, cut)
    torch.testing.assert_close(forward_logits(model, {**texts(), ACTIVATION: activation}), expected)
