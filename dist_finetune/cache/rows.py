"""Batches of stored activations in the place of token numbers and images."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset

from dist_finetune.cache.cut import ACTIVATION
from dist_finetune.cache.store import Layout, StoredRows
from dist_finetune.data.loading import Batch
from dist_finetune.data.targets import stacked_labels


@dataclass(frozen=True)
class CachedRows(Dataset[Any]):
    """Numbers of stored rows, with what a batch needs beside the activation: the encoded row of a text that the tail
    reads too, or the label.

    A key (epoch, row) gives the row's version of that epoch: one of `views`, in turn.
    """

    base: Any
    reads_text: bool
    views: int = 1

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, key: int | tuple[int, int]) -> Any:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        stored = (epoch % self.views) * len(self) + index if epoch else index
        return stored, (self.base[index] if self.reads_text else {"label": self.base.labels[index]})


@dataclass(frozen=True)
class CachedCollate:
    """Collates rows of `CachedRows`: activations (B, T, ...) padded with zeros like the text, or (B, ...)."""

    stored: StoredRows
    layout: Layout
    is_text: bool
    collate_text: Callable[[list[Any]], Batch] | None
    """None where the tail reads the activation alone."""
    pads_left: bool

    def __call__(self, rows: list[Any]) -> Batch:
        if self.collate_text is None:
            batch: Batch = {"inputs": {}, "labels": stacked_labels([row for _, row in rows])}
        else:
            batch = self.collate_text([row for _, row in rows])
        lengths = self.layout.lengths
        width = () if lengths is None else (batch["inputs"]["input_ids"].shape[1],)
        activation = torch.zeros(len(rows), *width, *self.layout.piece_shape)
        filled = activation.numpy()
        for row, (index, _) in zip(filled, rows, strict=True):
            if lengths is not None:
                row = row[-lengths[index] :] if self.pads_left else row[: lengths[index]]
            self.stored.read_into(index, row)
        if self.is_text:
            batch["inputs"][ACTIVATION] = activation
        else:
            is_map = activation.dim() == 4
            batch["inputs"] = activation.contiguous(memory_format=torch.channels_last) if is_map else activation
        return batch
