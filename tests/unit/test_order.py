"""Parts are numbered in the order in which a forward pass runs them, however a model registers its modules."""

from typing import Any

import pytest
import torch
from torch import nn

from dist_finetune.data.image_input import ImageInput
from dist_finetune.freeze import compile_freeze
from dist_finetune.models.card import ModelCard
from dist_finetune.models.order import structure_for, visit_order
from dist_finetune.spec import FreezeSpec


def card_of(image_size: int | None = None) -> ModelCard:
    """A user's model of images, or of texts."""
    image = ImageInput(size=(image_size, image_size)) if image_size else None
    return ModelCard("custom", "mine", "mine", "image" if image else "text", image, None if image else 64, False, 1e-3)


class Block(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(x).relu())


class HeadFirst(nn.Module):
    """Registered from the last module to the first; `backwards` runs its blocks against their numbers."""

    def __init__(self, backwards: bool = False) -> None:
        super().__init__()
        self.head = nn.Linear(16, 3)
        self.drop = nn.Dropout(0.1)
        self.norm = nn.LayerNorm(16)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.tokens = nn.Embedding(50, 16)
        self.backwards = backwards

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        x = self.tokens(input_ids) * attention_mask[..., None]
        for block in reversed(self.blocks) if self.backwards else self.blocks:
            x = block(x)
        return self.head(self.drop(self.norm(x).mean(1)))


def trainable(model: nn.Module, **freeze: Any) -> set[str]:
    """Modules with something left to train."""
    names = compile_freeze(FreezeSpec.model_validate(freeze), structure_for(model, card_of()), model).trainable
    return {name.rpartition(".")[0] for name in names}


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_a_head_that_is_registered_first_is_the_head(device: str) -> None:
    with torch.device(device):
        model = HeadFirst()
    structure = structure_for(model, card_of())
    assert structure.of_kind("embeddings").modules == ("tokens",)  # type: ignore[union-attr]
    assert structure.of_kind("neck").modules == ("norm",)  # type: ignore[union-attr]
    assert structure.of_kind("head").modules == ("drop", "head")  # type: ignore[union-attr]
    assert structure.notes == ()
    assert trainable(model, embeddings=True, layers="first 2") == {
        "head", "norm", "blocks.2.up", "blocks.2.down", "blocks.3.up", "blocks.3.down",
    }  # fmt: skip
    assert all(module.training for module in model.modules())


def test_blocks_that_run_backwards_are_numbered_as_they_run() -> None:
    with torch.device("meta"):
        model = HeadFirst(backwards=True)
    structure = structure_for(model, card_of())
    assert [p.modules for p in structure.blocks] == [("blocks.3",), ("blocks.2",), ("blocks.1",), ("blocks.0",)]
    left = {"blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down", "norm", "head"}
    assert trainable(model, embeddings=True, layers="first 2") == left


def test_a_cnn_that_runs_its_stages_backwards_is_cut_where_channels_change() -> None:
    class Unit(nn.Module):
        def __init__(self, before: int, after: int) -> None:
            super().__init__()
            self.conv = nn.Conv2d(before, after, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x)

    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(32, 2)
            self.units = nn.ModuleList([Unit(32, 32), Unit(16, 32), Unit(16, 16), Unit(8, 16)])
            self.stem = nn.Conv2d(3, 8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            for unit in reversed(self.units):
                x = unit(x)
            return self.fc(x.mean((2, 3)))

    structure = structure_for(Backwards(), card_of(16))
    assert [p.modules for p in structure.blocks] == [("units.3", "units.2"), ("units.1", "units.0")]
    assert structure.of_kind("head").modules == ("fc",)  # type: ignore[union-attr]


def test_parts_of_a_block_in_lists_of_their_own_are_one_block() -> None:
    class Lists(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Embedding(50, 16)
            self.mixers = nn.ModuleList(Block() for _ in range(3))
            self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(3))
            self.feeds = nn.ModuleList(Block() for _ in range(3))
            self.out = nn.Linear(16, 2)

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            x = self.tokens(input_ids)
            for mixer, norm, feed in zip(self.mixers, self.norms, self.feeds, strict=True):
                x = feed(norm(mixer(x)))
            return self.out(x.mean(1))

    structure = structure_for(Lists(), card_of())
    assert [p.modules for p in structure.blocks] == [(f"mixers.{i}", f"norms.{i}", f"feeds.{i}") for i in range(3)]
    assert structure.of_kind("neck") is None
    assert structure.of_kind("other") is None


def test_a_scale_behind_the_last_linear_layer_belongs_to_the_head() -> None:
    class Scaled(HeadFirst):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.LayerNorm(3)

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.scale(super().forward(input_ids, attention_mask))

    assert structure_for(Scaled(), card_of()).of_kind("head").modules == ("drop", "head", "scale")  # type: ignore[union-attr]


def test_a_model_that_reads_values_keeps_the_order_in_which_it_is_registered() -> None:
    class Reads(HeadFirst):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            if bool(input_ids.any()):
                raise ValueError("padding only")
            return super().forward(input_ids, attention_mask)

    with torch.device("meta"):
        model = Reads()
    assert visit_order(model, card_of()) == ()
    assert structure_for(model, card_of()).depth == 4
