"""Models of images in which a layer takes no part: `unused_model:on_all`, and `unused_model:on_rank_1`, there alone."""

import os

import torch
from torch import nn


class Unused(nn.Module):
    def __init__(self, num_classes: int, uses_spare: bool) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 8, 3, stride=2)
        self.spare = nn.Linear(8, 8)
        self.head = nn.Linear(8, num_classes)
        self.uses_spare = uses_spare

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        features = self.body(pixels).relu().mean((2, 3))
        return self.head(self.spare(features) if self.uses_spare else features)


def on_all(num_classes: int) -> nn.Module:
    return Unused(num_classes, uses_spare=False)


def on_rank_1(num_classes: int) -> nn.Module:
    return Unused(num_classes, uses_spare=os.environ["RANK"] != "1")


for build in (on_all, on_rank_1):
    build.modality, build.image_size = "image", 32  # type: ignore[attr-defined]
