"""The few models whose parts can't be told from how their modules stand: what belongs where, by class.

Keys are `package.ClassName` of any submodule; the paths in a layout are relative to that submodule.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from dist_finetune.models.blocks import BlockPaths, children_of, join


@dataclass(frozen=True)
class Layout:
    """`blocks` where the model's own order misleads; `parts` names the part (a `Part.label`) of single modules."""

    blocks: BlockPaths = ()
    parts: dict[str, str] = field(default_factory=dict)


def known_layout(model: nn.Module) -> Layout:
    """What the table says about `model`, with paths from its root; empty for a model it has nothing on."""
    blocks: BlockPaths = ()
    parts: dict[str, str] = {}
    for path, module in model.named_modules():
        layout_of = TABLE.get(f"{type(module).__module__.partition('.')[0]}.{type(module).__name__}")
        if layout_of is not None:
            layout = layout_of(module)
            blocks = blocks or tuple(tuple(join(path, p) for p in block) for block in layout.blocks)
            parts |= {join(path, p): label for p, label in layout.parts.items()}
    return Layout(blocks, parts)


def _albert(encoder: Any) -> Layout:
    """ALBERT runs a group of weights several times: block i is a pass, not a module of its own (arXiv:1909.11942)."""
    depth, num_groups = encoder.config.num_hidden_layers, encoder.config.num_hidden_groups
    return Layout(blocks=tuple((f"albert_layer_groups.{int(i / (depth / num_groups))}",) for i in range(depth)))


def _deberta(encoder: Any) -> Layout:
    """Relative position embeddings and their norm feed every block; the convolution follows block 0."""
    parts = {"rel_embeddings": "embeddings", "LayerNorm": "embeddings", "conv": "block 0"}
    names = [name for name, _ in children_of(encoder)]
    return Layout(parts={name: label for name, label in parts.items() if name in names})


def _xlm(model: Any) -> Layout:
    """A block's attention, feed-forward layer and norms lie in four lists."""
    lists = ("attentions", "layer_norm1", "ffns", "layer_norm2")
    return Layout(blocks=tuple(tuple(f"{name}.{i}" for name in lists) for i in range(len(model.ffns))))


def _torchvision_stages(model: Any) -> Layout:
    """`features` alternates stages and the downsampling in front of each; the same class, so order alone can't tell."""
    num_modules = len(model.features)
    later = tuple((f"features.{i}", f"features.{i + 1}") for i in range(2, num_modules - 1, 2))
    return Layout(blocks=(("features.1",), *later))


TABLE: dict[str, Callable[[Any], Layout]] = {
    "transformers.AlbertTransformer": _albert,
    "transformers.DebertaEncoder": _deberta,
    "transformers.DebertaV2Encoder": _deberta,
    "transformers.FlaubertModel": _xlm,
    "transformers.XLMModel": _xlm,
    "torchvision.ConvNeXt": _torchvision_stages,
    "torchvision.SwinTransformer": _torchvision_stages,
}
