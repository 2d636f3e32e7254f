"""Labels of encoded rows as arrays, and of a batch as a tensor."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor

from dist_finetune.data.arrow import column_values
from dist_finetune.tasks.names import TaskName


def label_array(table: Dataset, task: TaskName, num_outputs: int) -> NDArray[Any]:
    """The column "label" of a table: int64 (N,) classes, float32 (N,) numbers, or float32 (N, C) of 0 and 1."""
    cells = column_values(table, "label")
    if task == "regression":
        return np.asarray(cells, dtype=np.float32)
    if task != "multilabel":
        return np.asarray(cells, dtype=np.int64)
    labels = np.zeros((len(cells), num_outputs), np.float32)
    for row, indices in enumerate(cells):
        labels[row, np.atleast_1d(np.asarray(indices, np.int64))] = 1
    return labels


def stacked_labels(rows: Sequence[Mapping[str, Any]]) -> Tensor:
    """The entries "label" of encoded rows: int64 (B,), float32 (B,) or float32 (B, C)."""
    return torch.from_numpy(np.asarray([row["label"] for row in rows]))
