"""With `model.dropout: 0.0` a model in train mode computes the same twice, wherever its library keeps the numbers."""

import pytest
import timm
import torch
import torchvision
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
)

from dist_finetune.errors import UserError
from dist_finetune.models.dropout import has_dropout, set_config_dropout, set_dropout
from dist_finetune.plan import make_plan
from dist_finetune.spec import Spec

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
TEXT = {
    "bert": {**TINY, "vocab_size": 50, "hidden_dropout_prob": 0.4, "attention_probs_dropout_prob": 0.4},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "vocab_size": 50},
    "deberta-v2": {
        **TINY, "vocab_size": 50, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "pooler_dropout": 0.5,
    },
    "roberta": {**TINY, "vocab_size": 50, "classifier_dropout": 0.5},
    "electra": {**TINY, "vocab_size": 50, "embedding_size": 16, "classifier_dropout": 0.5},
}  # fmt: skip
IMAGE = {
    "vit": {**TINY, "image_size": 32, "patch_size": 8, "hidden_dropout_prob": 0.4, "attention_probs_dropout_prob": 0.4},
    "convnext": {"hidden_sizes": [8, 16], "depths": [2, 2], "num_stages": 2, "drop_path_rate": 0.5},
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 320, "dropout_rate": 0.5},
    "swin": {
        "embed_dim": 8,
        "depths": [2, 2],
        "num_heads": [2, 2],
        "image_size": 32,
        "window_size": 4,
        "drop_path_rate": 0.5,
    },
}
OTHERS = {
    "timm efficientnet": lambda: timm.create_model("tf_efficientnet_lite0", drop_rate=0.5, drop_path_rate=0.5),
    "timm vit": lambda: timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=2, drop_rate=0.5, attn_drop_rate=0.5, proj_drop_rate=0.5,
        drop_path_rate=0.5,
    ),
    "timm convnext": lambda: timm.create_model("convnext_atto", drop_rate=0.5, drop_path_rate=0.5),
    "torchvision efficientnet": lambda: torchvision.models.efficientnet_b0(stochastic_depth_prob=0.5),
    "torchvision vit": lambda: torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32,
        dropout=0.5, attention_dropout=0.5,
    ),
    "user module": lambda: nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(3072, 8), nn.AlphaDropout(0.5)),
}  # fmt: skip


def logits_twice(model: nn.Module, inputs: dict[str, torch.Tensor] | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    model.train()
    # Fresh weights of deep CNNs shrink the signal to zero, where all dropout looks alike.
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    torch.manual_seed(0)
    outputs = [model(**inputs) if isinstance(inputs, dict) else model(inputs) for _ in range(2)]
    first, second = (getattr(output, "logits", output) for output in outputs)
    return first, second


def text_model(kind: str, dropout: float | None) -> nn.Module:
    config = AutoConfig.for_model(kind, **TEXT[kind])
    if dropout is not None:
        set_config_dropout(config, dropout)
    model = AutoModelForSequenceClassification.from_config(config)
    if dropout is not None:
        set_dropout(model, dropout)
    return model


@pytest.mark.parametrize("kind", TEXT)
def test_text_models_repeat_themselves_without_dropout(kind: str) -> None:
    inputs = {"input_ids": torch.arange(2, 22).view(2, 10), "attention_mask": torch.ones(2, 10, dtype=torch.long)}
    first, second = logits_twice(text_model(kind, None), inputs)
    assert not torch.equal(first, second), "the case proves nothing: no dropout to begin with"
    first, second = logits_twice(text_model(kind, 0.0), inputs)
    assert torch.equal(first, second)


@pytest.mark.parametrize("kind", IMAGE)
@pytest.mark.parametrize("by", ["config", "modules"])
def test_image_models_repeat_themselves_without_dropout(kind: str, by: str) -> None:
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    config = AutoConfig.for_model(kind, **IMAGE[kind])
    first, second = logits_twice(AutoModelForImageClassification.from_config(config), images)
    assert not torch.equal(first, second)
    if by == "config":
        set_config_dropout(config, 0.0)
    model = AutoModelForImageClassification.from_config(config)
    if by == "modules":
        set_dropout(model, 0.0)
    first, second = logits_twice(model, images)
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", OTHERS)
def test_other_libraries_models_repeat_themselves_without_dropout(name: str) -> None:
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = OTHERS[name]()
    assert not torch.equal(*logits_twice(model, images))
    set_dropout(model, 0.0)
    assert torch.equal(*logits_twice(model, images))


def test_a_dropout_above_zero_reaches_every_dropout_and_leaves_stochastic_depth() -> None:
    model = timm.create_model("convnext_atto", drop_rate=0.1, drop_path_rate=0.2)
    set_dropout(model, 0.3)
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.3}
    rates = [m.drop_prob for m in model.modules() if type(m).__name__ == "DropPath"]
    assert max(rates) == pytest.approx(0.2)
    bert = text_model("bert", 0.3)
    assert {m.p for m in bert.modules() if isinstance(m, nn.Dropout)} == {0.3}
    assert bert.config.classifier_dropout == 0.3


def test_a_dropout_is_found_wherever_it_was_set() -> None:
    for kind in TEXT:
        assert has_dropout(text_model(kind, 0.3), 0.3)
    for build in OTHERS.values():
        model = build()
        assert not has_dropout(model, 0.3)
        set_dropout(model, 0.3)
        assert has_dropout(model, 0.3)


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:test_resnet"])
def test_a_dropout_without_effect_is_refused(name: str) -> None:
    """timm's ResNet has one before its head, torchvision's has none."""
    data = {"train": "builtin:digits", "max_rows": 100, "image_size": 32}
    spec = Spec.model_validate(
        {"model": {"name": name, "weights": "none", "dropout": 0.3}, "data": data, "name": "dropped"}
    )
    if name.startswith("timm"):
        make_plan(spec)
        return
    with pytest.raises(UserError, match=r"^model.dropout: 0.3 has no effect: torchvision:resnet18 has no dropout"):
        make_plan(spec)
    make_plan(spec.model_copy(update={"model": spec.model.model_copy(update={"dropout": 0.0})}))
