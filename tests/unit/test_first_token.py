"""The last block of classifiers that read the first token: it computes no other, with the same logits and gradients."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoModelForTokenClassification

from dist_finetune.models.first_token import FAMILIES, compute_first_token_only
from dist_finetune.models.sources import forward_logits

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


def classifier(
    model_type: str, *, auto=AutoModelForSequenceClassification, attention: str = "sdpa", **more
) -> nn.Module:
    config = AutoConfig.for_model(model_type, **{**SMALL, **more})
    torch.manual_seed(0)
    return auto.from_config(config, attn_implementation=attention, dtype=torch.float32).train()


def texts() -> dict[str, torch.Tensor]:
    """Three texts, two of them with padding."""
    ids = torch.arange(3 * 8).view(3, 8) % 90 + 5
    mask = torch.ones_like(ids)
    mask[0, 5:] = mask[1, 3:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def with_gradients(model: nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    logits = forward_logits(model, inputs)
    logits.square().sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_gives_the_same_logits_and_gradients(family: str, attention: str) -> None:
    whole = classifier(MODEL_TYPES[family], attention=attention)
    assert type(whole).__name__ == f"{family}ForSequenceClassification"
    first = copy.deepcopy(whole)

    assert compute_first_token_only(first)

    (logits, gradients), (logits_of_first, gradients_of_first) = (with_gradients(m, texts()) for m in (whole, first))
    torch.testing.assert_close(logits_of_first, logits, rtol=1e-5, atol=1e-6)
    assert gradients.keys() == gradients_of_first.keys()
    largest = max(gradient.abs().max().item() for gradient in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_of_first[name], gradient, rtol=1e-4, atol=1e-6 * largest, msg=name)


def test_it_computes_a_sixth_of_the_last_block() -> None:
    model = classifier("bert")
    block, hidden = model.bert.encoder.layer[-1], torch.rand(3, 64, 48)

    def flops() -> int:
        with FlopCounterMode(display=False) as counter:
            block(hidden)
        return counter.get_total_flops()

    whole = flops()
    assert compute_first_token_only(model)
    assert 2 / 12 * 0.8 < flops() / whole < 2 / 12 * 1.2  # keys and values: 2 of 12 matrices of H x H; texts are short


def test_it_works_without_data_and_leaves_the_mode_alone() -> None:
    with torch.device("meta"):
        model = classifier("bert").eval()
    assert compute_first_token_only(model)
    assert not any(module.training for module in model.modules())
    assert forward_logits(model, {"input_ids": texts()["input_ids"].to("meta")}).shape == (3, 2)


def test_random_numbers_are_left_alone() -> None:
    model = classifier("bert", hidden_dropout_prob=0.5)
    torch.manual_seed(1)
    expected = torch.rand(4)
    torch.manual_seed(1)
    assert compute_first_token_only(model)
    assert torch.equal(torch.rand(4), expected)


def unchanged(model: nn.Module) -> bool:
    return not any("forward" in vars(module) or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(lambda: classifier("bert", auto=AutoModelForTokenClassification), id="tagger"),
        pytest.param(lambda: classifier("bert", is_decoder=True), id="decoder"),
        pytest.param(lambda: classifier("distilbert"), id="distilbert"),
        pytest.param(lambda: nn.Linear(2, 2), id="not of transformers"),
    ],
)
def test_other_models_stay_as_they_are(model) -> None:
    other = model()
    assert not compute_first_token_only(other)
    assert unchanged(other)


def test_a_class_of_the_same_name_from_elsewhere_stays_as_it_is() -> None:
    model = classifier("bert")
    kind = type(model)
    model.__class__ = type(kind.__name__, (kind,), {"__module__": "transformers_modules.own"})
    assert not compute_first_token_only(model)


@pytest.mark.parametrize("broken", ["gone", "other arguments", "other numbers"])
def test_another_versions_cross_attention_is_not_trusted(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.bert import modeling_bert

    own = modeling_bert.BertCrossAttention.forward
    if broken == "gone":
        monkeypatch.delattr(modeling_bert, "BertCrossAttention")
    elif broken == "other arguments":
        monkeypatch.setattr(modeling_bert.BertCrossAttention, "forward", lambda self, hidden: own(self, hidden, hidden))
    else:
        monkeypatch.setattr(
            modeling_bert.BertCrossAttention, "forward", lambda self, one, all, mask: own(self, one, all[:, 1:], mask)
        )
    model = classifier("bert")
    assert not compute_first_token_only(model)
    assert unchanged(model)
    assert model.training
