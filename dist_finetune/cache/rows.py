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
        activation = self._activation([index for index, _ in rows], batch)
        if self.is_text:
            batch["inputs"][ACTIVATION] = activation
        else:
            is_map = activation.dim() == 4
            batch["inputs"] = activation.contiguous(memory_format=torch.channels_last) if is_map else activation
        return batch

    def _activation(self, indices: list[int], batch: Batch) -> torch.Tensor:
        lengths = self.layout.lengths
        if lengths is None:
            return torch.from_numpy(self.stored.read(indices))
        activation = torch.zeros(len(indices), batch["inputs"]["input_ids"].shape[1], *self.layout.piece_shape)
        for row, index in zip(activation.numpy(), indices, strict=True):
            row = row[-lengths[index] :] if self.pads_left else row[: lengths[index]]
            self.stored.read_into(index, row)
        return activation
