"""Stored activations: one folder a key, one flat file a split and writing rank, rows without padding, memory-mapped.

<root>/<key>/meta.json            what it was made from, row shape, number type, shards
<root>/<key>/train-00000.bin      rows 0, W, 2W, ... of W shards, end to end
"""

import contextlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from dist_finetune.run_folder import write_json

NUMPY_TYPES: Mapping[str, type[np.generic]] = {"fp32": np.float32, "bf16": np.uint16}  # numpy has no bf16 of its own
TORCH_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Layout:
    """How the rows of a split lie in its files. A row has `lengths[i]` pieces of `piece_shape` (one where None)."""

    num_rows: int
    piece_shape: tuple[int, ...]
    dtype: str
    num_shards: int
    lengths: NDArray[np.int32] | None

    @property
    def piece_elements(self) -> int:
        return int(np.prod(self.piece_shape, dtype=np.int64))

    def offsets(self, shard: int) -> NDArray[np.int64]:
        """Element offsets of the rows of a shard, (rows + 1,)."""
        num_rows = len(range(shard, self.num_rows, self.num_shards))
        pieces = np.ones(num_rows, np.int64) if self.lengths is None else self.lengths[shard :: self.num_shards]
        return np.concatenate([[0], np.cumsum(pieces, dtype=np.int64)]) * self.piece_elements

    @property
    def num_bytes(self) -> int:
        """Bytes of all shards."""
        pieces = self.num_rows if self.lengths is None else int(self.lengths.sum())
        return pieces * self.piece_elements * np.dtype(NUMPY_TYPES[self.dtype]).itemsize


class StoredRows:
    """Read access to one split. Row i is (length, *piece_shape), or `piece_shape` where rows have no length."""

    def __init__(self, folder: Path, split: str, layout: Layout) -> None:
        self._layout = layout
        self._offsets = [layout.offsets(shard) for shard in range(layout.num_shards)]
        dtype = NUMPY_TYPES[layout.dtype]
        self._shards = [
            # a plain array over the map: a slice of numpy's own memmap type takes three times as long
            np.memmap(shard_path(folder, split, shard), dtype, "r").view(np.ndarray)
            if self._offsets[shard][-1]
            else np.empty(0, dtype)
            for shard in range(layout.num_shards)
        ]

    def read_into(self, index: int, out: torch.Tensor) -> None:
        """Copies row `index` into a float32 tensor of the row's shape."""
        shard, position = index % self._layout.num_shards, index // self._layout.num_shards
        span = slice(self._offsets[shard][position], self._offsets[shard][position + 1])
        if self._layout.dtype == "fp32":
            out.numpy().reshape(-1)[...] = self._shards[shard][span]
        else:
            out.view(-1).copy_(torch.from_numpy(self._shards[shard][span].copy()).view(torch.bfloat16))


class ShardWriter:
    """Writes the rows of one shard in any order, and goes on with one that was left half-written."""

    def __init__(self, folder: Path, split: str, shard: int, layout: Layout) -> None:
        self._layout, self._offsets = layout, layout.offsets(shard)
        self._path = shard_path(folder, split, shard)
        self._note = self._path.with_suffix(".json")
        size, dtype = int(self._offsets[-1]), NUMPY_TYPES[layout.dtype]
        self.num_done = _rows_done(self._note) if self._path.exists() else 0
        """Rows that an earlier writer of the same shard has noted as done."""
        mode: Literal["r+", "w+"] = "r+" if self.num_done else "w+"
        self._file = np.memmap(self._path, dtype, mode, shape=(size,)) if size else None

    def write(self, index: int, row: torch.Tensor) -> None:
        """Stores a row of the split (by its number in the split) in the layout's number type."""
        assert self._file is not None
        position = index // self._layout.num_shards
        flat = row.detach().to("cpu", TORCH_TYPES[self._layout.dtype]).contiguous().view(-1)
        stored = flat if self._layout.dtype == "fp32" else flat.view(torch.uint16)
        self._file[self._offsets[position] : self._offsets[position + 1]] = stored.numpy()

    def note(self, num_rows: int) -> None:
        """Notes that `num_rows` rows, in the caller's order, are on the disk."""
        if self._file is None:
            self._path.touch()
        else:
            self._file.flush()
        with contextlib.suppress(FileNotFoundError):  # another job has built the same and was faster
            write_json(self._note, {"rows": num_rows})


def _rows_done(note: Path) -> int:
    try:
        return int(json.loads(note.read_text(encoding="utf-8"))["rows"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def shard_path(folder: Path, split: str, shard: int) -> Path:
    """The file of a split's shard."""
    return folder / f"{split}-{shard:05d}.bin"


def layout_json(layout: Layout) -> dict[str, Any]:
    """A layout without its lengths, which follow from the encoded rows."""
    return {k: v for k, v in asdict(layout).items() if k != "lengths"}
