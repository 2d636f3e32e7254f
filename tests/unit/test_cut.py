"""Cutting a model above its frozen prefix: the tail, fed the stored activation, gives the whole model's logits."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dist_finetune.cache.build import _cut_on_device
from dist_finetune.cache.cut import ACTIVATION, NoCut, find_cut, make_tail, reads_first_only, run_prefix
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
    before = copy.deepcopy(model.state_dict())
    cut = find_cut(model, inputs)
    assert cut.at.path == at
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), "statistics moved"
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


class MeanOfTokens(nn.Module):
    """A head on the mean of what a frozen embedding gives, with all its weights zero at the start."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(1000, 4).requires_grad_(False).eval(), nn.Linear(4, 2)
        nn.init.zeros_(self.head.weight)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        states = self.embedding(input_ids) * attention_mask[..., None]
        return SimpleNamespace(logits=self.head(states.sum(1) / attention_mask.sum(1, keepdim=True)))


@pytest.mark.parametrize(("layers", "first_only"), [("all", True), ("0-4", False)])
def test_a_tail_that_reads_the_first_position_only_is_fed_no_other(layers: str, first_only: bool) -> None:
    """Seen also where the last layer's weights are zeros, which let no change through."""
    model, manifest, inputs = frozen_model("demo:minilm", {"embeddings": True, "layers": layers})
    assert isinstance(inputs, dict)
    train_mode(model, manifest)
    cut = find_cut(model, inputs)
    model.eval()
    activation, names = run_prefix(model, cut, inputs).clone(), list(model.state_dict())
    weight = model.get_parameter("classifier.weight")
    trained = weight.detach().clone()
    nn.init.zeros_(weight)
    assert reads_first_only(model, cut, {**inputs, ACTIVATION: activation}) == first_only
    assert list(model.state_dict()) == names, "the model is as it was"
    weight.data.copy_(trained)
    cut = replace(cut, reads_first_only=first_only)
    part = cut.read_part(activation)
    assert part.shape == (3, *cut.row_shape) == (3, 1 if first_only else 9, 384)
    whole = forward_logits(model, inputs)
    make_tail(model, cut)
    torch.testing.assert_close(forward_logits(model, {**inputs, ACTIVATION: part}), whole, rtol=0, atol=1e-6)


def test_a_head_on_the_mean_reads_all_positions_also_with_zeros_for_weights() -> None:
    model = MeanOfTokens()
    inputs = {"input_ids": torch.randint(5, 1000, (3, 9)), "attention_mask": torch.ones(3, 9)}
    cut = find_cut(model, inputs)
    assert not reads_first_only(model, cut, {**inputs, ACTIVATION: run_prefix(model, cut, inputs).clone()})


@pytest.mark.parametrize(
    ("name", "rules", "chain"),
    [
        ("demo:minilm", {"embeddings": True, "layers": "all"}, ("bert.pooler", "dropout", "classifier")),
        ("demo:minilm", {"embeddings": True, "layers": "0-3"}, ()),  # layers that train are given a mask too
        ("timm:resnet18", {"rule": "backbone"}, ("fc",)),
        ("timm:resnet18", {"embeddings": True, "layers": "0-2"}, ("layer4", "global_pool", "fc")),
        ("torchvision:resnet18", {"rule": "backbone"}, ()),  # flattened by the model itself
    ],
    ids=lambda value: str(value),
)
def test_a_tail_that_is_a_chain_of_modules_calls_these_alone(
    name: str, rules: dict[str, object], chain: tuple[str, ...]
) -> None:
    """It takes the activation without the texts, gives the same logits, and BatchNorm that trains moves the same."""
    model, manifest, inputs = frozen_model(name, rules)
    train_mode(model, manifest)
    cut = find_cut(model, inputs)
    assert cut.chain == chain
    if not chain:
        return
    model.eval()
    activation = run_prefix(model, cut, inputs).clone()
    whole = copy.deepcopy(model)
    make_tail(model, cut)
    fed = {ACTIVATION: activation} if isinstance(inputs, dict) else activation
    torch.testing.assert_close(forward_logits(model, fed), forward_logits(whole, inputs), rtol=0, atol=1e-6)
    for each, given in ((whole, inputs), (model, fed)):
        train_mode(each, manifest)
        forward_logits(each, given)
    moved = whole.state_dict()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, moved[key], rtol=1e-5, atol=1e-6)


class Between(nn.Module):
    """Two layers, and something of the model's own between them that leaves no new tensor, or a module beside them."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.stem = what, nn.Linear(4, 4).requires_grad_(False).eval()
        self.middle, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
        self.beside = nn.Linear(4, 2) if what == "beside" else nn.Identity()
        self.layerdrop = 0.01 if what == "left out" else 0.0

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode(self.what == "inference mode"):
            x = self.stem(image)
        if self.what == "inference mode":
            x = x.clone()
        if not (self.training and torch.rand(()) < self.layerdrop):
            x = self.middle(x)
        if self.what == "in place":
            x.mul_(2)
        logits = self.head(x)
        if self.what == "beside":
            return logits + self.beside(x)
        if self.what == "after":
            return logits.add_(1)
        return logits


@pytest.mark.parametrize("what", ["nothing", "in place", "beside", "after", "inference mode"])
def test_what_a_model_does_between_its_modules_makes_no_chain(what: str) -> None:
    torch.manual_seed(0)
    model = Between(what)
    inputs = torch.randn(3, 4)
    cut = find_cut(model, inputs)
    assert cut.at.path == "stem"
    assert cut.chain == (("middle", "head") if what == "nothing" else ())
    whole, activation = forward_logits(model, inputs), run_prefix(model, cut, inputs).clone()
    make_tail(model, cut)
    torch.testing.assert_close(forward_logits(model, activation), whole, rtol=0, atol=1e-6)


def test_a_model_that_leaves_out_modules_at_random_makes_no_chain() -> None:
    """Though all of them were there when it was traced."""
    torch.manual_seed(0)
    model, inputs = Between("left out"), torch.randn(3, 4)
    assert find_cut(model, inputs).chain == ()
    model.training = False  # the root alone, as where it is held in eval mode
    assert find_cut(model, inputs).chain == ("middle", "head")


@pytest.mark.parametrize(("precision", "chain"), [("fp32", ("middle", "tanh", "head")), ("bf16", ())])
def test_a_cast_between_modules_makes_no_chain_where_it_casts(precision: str, chain: tuple[str, ...]) -> None:
    class Cast(Between):
        def __init__(self) -> None:
            super().__init__("nothing")
            self.tanh = nn.Tanh()

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return self.head(self.tanh(self.middle(self.stem(image)).float()))

    plan = SimpleNamespace(precision=precision, topology=SimpleNamespace(device="cpu"), is_larger_than_device=False)
    job, manifest = SimpleNamespace(plan=plan, world=SimpleNamespace(device="cpu")), SimpleNamespace(mode="eval")
    manifest.held_modules = ["stem"]
    batch = {"inputs": torch.randn(3, 4)}
    cut = _cut_on_device(job, SimpleNamespace(manifest=manifest), Cast(), batch)  # type: ignore[arg-type]
    assert cut.chain == chain


@pytest.mark.parametrize("layers", ["0-3", "all"])
def test_undo_gives_the_model_back(layers: str) -> None:
    model, manifest, inputs = frozen_model("demo:minilm", {"embeddings": True, "layers": layers})
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


def test_the_cut_lies_below_parameters_whose_own_module_is_never_called() -> None:
    """torch's attention hands the weights of `out_proj` to a function, and a model may use parameters of its own."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4), requires_grad=False)
            self.stem, self.attention = nn.Linear(4, 4), nn.MultiheadAttention(4, 2, batch_first=True)
            self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x * self.scale)
            return self.head(self.norm(self.attention(x, x, x)[0]).mean(1))

    model, inputs = Attention(), torch.randn(3, 5, 4)
    for part in (model.stem, model.attention, model.norm):
        part.requires_grad_(False).eval()
    assert find_cut(model, inputs).at.path == "norm"
    model.attention.out_proj.requires_grad_()
    assert find_cut(model, inputs).at.path == "stem"
    model.scale.requires_grad_()
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
