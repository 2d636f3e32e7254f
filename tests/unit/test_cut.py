"""Cutting a model above its frozen prefix: the tail, fed the stored activation, gives the whole model's logits."""

import copy

import pytest
import torch
from torch import nn

from dist_finetune.cache.cut import ACTIVATION, NoCut, find_cut, make_tail, run_prefix
from dist_finetune.freeze import Manifest, apply_freeze, compile_freeze, train_mode
from dist_finetune.models.sources import build_model, describe_model, forward_logits
from dist_finetune.models.structure import structure_of
from dist_finetune.spec import FreezeSpec, ModelSpec

CASES = [
    ("demo:minilm", {"embeddings": True, "layers": "0-3"}, "bert.encoder.layer.3"),
    ("demo:minilm", {"embeddings": True, "layers": "all"}, "bert.encoder.layer.5"),
    ("demo:minilm", {"rule": "backbone"}, "bert.pooler"),
    ("demo:efficientnet-lite0", {"embeddings": True, "layers": "0-4"}, "blocks.4"),
    ("demo:efficientnet-lite0", {"rule": "backbone"}, "global_pool"),
    ("timm:resnet18", {"embeddings": True, "layers": "0-1"}, "layer2"),
    ("timm:resnet18", {"rule": "backbone"}, "global_pool"),
    ("timm:convnext_atto", {"embeddings": True, "layers": "0-2"}, "stages.2"),
    ("timm:densenet121", {"embeddings": True, "layers": "0-1"}, "features.transition2"),
    ("timm:vit_tiny_patch16_224", {"embeddings": True, "layers": "0-7"}, "blocks.7"),
    ("timm:vgg11_bn", {"layers": "0-2"}, "features.14"),
    ("torchvision:resnet18", {"embeddings": True, "layers": "0-1"}, "layer2"),
    ("torchvision:mobilenet_v3_small", {"rule": "backbone"}, "classifier.1"),
]


def frozen_model(name: str, rules: dict[str, object]) -> tuple[nn.Module, Manifest, object]:
    spec = ModelSpec(name=name, weights="none")
    fixed_size = "vit" in name or name.startswith("demo")
    card = describe_model(spec, None if fixed_size else 64)
    torch.manual_seed(0)
    model = build_model(card, spec, ("a", "b", "c"))
    manifest = compile_freeze(FreezeSpec(**rules), structure_of(model), model)
    apply_freeze(model, manifest)
    if card.image:
        return model, manifest, torch.randn(3, 3, *card.image.size)
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, 5:] = 0
    return model, manifest, {"input_ids": torch.randint(5, 1000, (3, 9)), "attention_mask": mask}


@pytest.mark.parametrize(("name", "rules", "at"), CASES, ids=lambda value: str(value))
def test_tail_gives_the_whole_models_logits(name: str, rules: dict[str, object], at: str) -> None:
    model, manifest, inputs = frozen_model(name, rules)
    train_mode(model, manifest)
    cut = find_cut(model, inputs)
    assert cut.at.path == at
    model.eval()
    whole = forward_logits(model, inputs)
    activation = run_prefix(model, cut, inputs).clone()
    tail = copy.deepcopy(model)
    make_tail(tail, cut)
    fed = {**inputs, ACTIVATION: activation} if isinstance(inputs, dict) else activation
    torch.testing.assert_close(forward_logits(tail, fed), whole, rtol=0, atol=1e-6)
    held = {n for n, _ in (*tail.named_parameters(), *tail.named_buffers())}
    assert held.isdisjoint(cut.dropped)
    assert set(manifest.trainable) <= held
    assert set(cut.dropped) <= set(manifest.frozen) | {n for n, _ in model.named_buffers()}


def test_trainable_parameters_get_the_whole_models_gradients() -> None:
    model, manifest, inputs = frozen_model("timm:resnet18", {"embeddings": True, "layers": "0-2"})
    train_mode(model, manifest)
    cut = find_cut(model, inputs)
    model.eval()
    activation = run_prefix(model, cut, inputs).clone()
    tail = copy.deepcopy(model)
    make_tail(tail, cut)
    forward_logits(model, inputs).square().sum().backward()
    forward_logits(tail, activation).square().sum().backward()
    whole = dict(model.named_parameters())
    for name, parameter in tail.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, whole[name].grad)


def test_undo_gives_the_model_back() -> None:
    model, manifest, inputs = frozen_model("demo:minilm", {"embeddings": True, "layers": "0-3"})
    train_mode(model, manifest)
    cut = find_cut(model, inputs)
    model.eval()
    before, names = forward_logits(model, inputs), list(model.state_dict())
    make_tail(model, cut)()
    assert list(model.state_dict()) == names
    torch.testing.assert_close(forward_logits(model, inputs), before, rtol=0, atol=0)


@pytest.mark.parametrize("rules", [{"layers": "1,2,3"}, {"patterns": ["*.LayerNorm.*"]}], ids=str)
def test_no_cut_where_something_trains_below(rules: dict[str, object]) -> None:
    model, manifest, inputs = frozen_model("demo:minilm", rules)
    train_mode(model, manifest)
    with pytest.raises(NoCut, match="no frozen part lies below"):
        find_cut(model, inputs)


def test_no_cut_inside_a_block_that_runs_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
            self.block.requires_grad_(False).eval()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.head(self.block(self.block(x)))
            return result

    with pytest.raises(NoCut, match="runs more than once"):
        find_cut(Twice(), torch.randn(2, 4))
