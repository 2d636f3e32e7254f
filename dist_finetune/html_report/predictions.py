"""Stored predictions of a classifier as confusions: which class was taken for which."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from dist_finetune.errors import UserError

LARGEST_BYTES = 400_000_000  # reading more would keep the end of a run waiting
MAX_CLASSES = 2000


@dataclass(frozen=True)
class Confusion:
    """`counts[i, j]` rows of true class i were taken for class j."""

    split: str
    classes: tuple[str, ...]
    counts: np.ndarray

    @property
    def accuracy(self) -> float:
        """Share of rows on the diagonal."""
        return float(np.trace(self.counts) / self.counts.sum())


def read_confusion(folder: Path, split: str, classes: tuple[str, ...]) -> Confusion | None:
    """The confusions of predictions/<split>.safetensors; None where there is no such file, or a very large one, or one
    without scores (N, C) of these classes."""
    path = folder / "predictions" / f"{split}.safetensors"
    if len(classes) > MAX_CLASSES or not path.is_file() or path.stat().st_size > LARGEST_BYTES:
        return None
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: can't be read: {error}") from None
    logits, labels = tensors.get("logits"), tensors.get("labels")
    if logits is None or labels is None or logits.ndim != 2 or labels.ndim != 1 or labels.dtype.kind != "i":
        return None
    num_classes = len(classes)
    if logits.shape[1] != num_classes or not len(labels) or labels.min() < 0 or labels.max() >= num_classes:
        return None
    pairs = labels.astype(np.int64) * num_classes + logits.argmax(1)
    counts = np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)
    return Confusion(split, classes, counts)
