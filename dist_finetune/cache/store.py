"""Stored activations: one folder a key, one flat file a split and writing rank, rows without padding, memory-mapped.

<root>/<key>/meta.json            what it was made from, row shape, number type, shards
<root>/<key>/train-00000.bin      the rows that the first of W ranks made, end to end, in ascending order
<root>/<key>/train.shards.npy     the shard of each row
"""

import contextlib
import errno
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dist_finetune.run_folder import write_json

NUMPY_TYPES: Mapping[str, type[np.generic]] = {"fp32": np.float32, "bf16": np.uint16}  # numpy has no bf16 of its own
TORCH_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


FORMAT = 2
"""Of these files; a part of each key, so that what an earlier version wrote is not taken for its like."""


@dataclass(frozen=True)
class Layout:
    """How the rows of a split lie in its files. A row has `lengths[i]` pieces of `piece_shape` (one where None), and
    lies in shard `shard_of[i]`, (num_rows,)."""

    num_rows: int
    piece_shape: tuple[int, ...]
    dtype: str
    num_shards: int
    lengths: NDArray[np.int32] | None
    shard_of: NDArray[np.uint16]

    @property
    def piece_elements(self) -> int:
        return int(np.prod(self.piece_shape, dtype=np.int64))

    @property
    def row_elements(self) -> NDArray[np.int64]:
        """Elements of each row, (num_rows,)."""
        pieces = np.ones(self.num_rows, np.int64) if self.lengths is None else self.lengths.astype(np.int64)
        return pieces * self.piece_elements

    def starts(self) -> NDArray[np.int64]:
        """Where each row starts in its shard, in elements, (num_rows,)."""
        sizes, starts = self.row_elements, np.zeros(self.num_rows, np.int64)
        for shard in range(self.num_shards):
            rows = np.flatnonzero(self.shard_of == shard)
            starts[rows] = np.cumsum(sizes[rows]) - sizes[rows]
        return starts

    def shard_elements(self, shard: int) -> int:
        """Elements of all rows of a shard."""
        return int(self.row_elements[self.shard_of == shard].sum())

    @property
    def num_bytes(self) -> int:
        """Bytes of all shards."""
        pieces = self.num_rows if self.lengths is None else int(self.lengths.sum())
        return pieces * self.piece_elements * np.dtype(NUMPY_TYPES[self.dtype]).itemsize


class StoredRows:
    """Read access to one split. Row i is (length, *piece_shape), or `piece_shape` where rows have no length.

    Raises OSError or ValueError where a file is not there, or too short.
    """

    def __init__(self, folder: Path, split: str, layout: Layout) -> None:
        self._layout = layout
        self._starts = layout.starts()
        self._ends = self._starts + layout.row_elements
        dtype = NUMPY_TYPES[layout.dtype]
        sizes = [layout.shard_elements(shard) for shard in range(layout.num_shards)]
        self._shards = [
            # a plain array over the map: a slice of numpy's own memmap type takes three times as long
            np.memmap(shard_path(folder, split, shard), dtype, "r", shape=(size,)).view(np.ndarray)
            if size
            else np.empty(0, dtype)
            for shard, size in enumerate(sizes)
        ]

    def read(self, indices: Sequence[int]) -> NDArray[np.float32]:
        """Rows without a length, (B, *piece_shape)."""
        layout, wanted = self._layout, np.asarray(indices)
        flat = np.empty((len(wanted), layout.piece_elements), np.float32)
        for number in np.unique(layout.shard_of[wanted]):
            here = np.flatnonzero(layout.shard_of[wanted] == number)
            pieces = self._shards[number].reshape(-1, layout.piece_elements)
            flat[here] = self._numbers(pieces[self._starts[wanted[here]] // layout.piece_elements])
        return flat.reshape(-1, *layout.piece_shape)

    def read_into(self, index: int, out: NDArray[np.float32]) -> None:
        """Copies row `index` into an array of the row's shape whose memory is in one piece."""
        stored = self._shards[self._layout.shard_of[index]][self._starts[index] : self._ends[index]]
        out.reshape(-1)[...] = self._numbers(stored)

    def _numbers(self, stored: NDArray[Any]) -> NDArray[np.float32]:
        if self._layout.dtype == "fp32":
            return stored
        return (stored.astype(np.uint32) << 16).view(np.float32)  # bf16 is the upper half of fp32


class ShardWriter:
    """Writes the rows of one shard in any order, and goes on with one that was left half-written.

    The file has its whole size from the start, and the disk the room for it: raises OSError where it has not. What is
    in it stays, so that a second writer of the same shard does the first no harm.
    """

    def __init__(self, folder: Path, split: str, shard: int, layout: Layout) -> None:
        self._layout, self._starts = layout, layout.starts()
        self._path = shard_path(folder, split, shard)
        self._note = self._path.with_suffix(".json")
        size, dtype = layout.shard_elements(shard), NUMPY_TYPES[layout.dtype]
        self.num_done = _rows_done(self._note) if self._path.exists() else 0
        """Rows that an earlier writer of the same shard has noted as done."""
        if size:
            _allocate(self._path, size * np.dtype(dtype).itemsize)
        self._file = np.memmap(self._path, dtype, "r+", shape=(size,)) if size else None

    def write(self, index: int, row: torch.Tensor) -> None:
        """Stores a row of the split (by its number in the split) in the layout's number type."""
        assert self._file is not None
        flat = row.detach().to("cpu", TORCH_TYPES[self._layout.dtype]).contiguous().view(-1)
        stored = flat if self._layout.dtype == "fp32" else flat.view(torch.uint16)
        start = self._starts[index]
        self._file[start : start + len(stored)] = stored.numpy()

    def note(self, num_rows: int) -> None:
        """Notes that `num_rows` rows, in the caller's order, are on the disk."""
        if self._file is None:
            self._path.touch()
        else:
            self._file.flush()
        with contextlib.suppress(OSError):  # another job has built the same and was faster, or the disk is full
            write_json(self._note, {"rows": num_rows})


def _allocate(path: Path, num_bytes: int) -> None:
    """Makes a file of so many bytes, all of them on the disk where the file system can: a disk that others fill later
    would otherwise end a process that writes to the map with SIGBUS."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        os.posix_fallocate(descriptor, 0, num_bytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        if os.fstat(descriptor).st_size < num_bytes:
            os.truncate(descriptor, num_bytes)
    finally:
        os.close(descriptor)


def _rows_done(note: Path) -> int:
    try:
        return int(json.loads(note.read_text(encoding="utf-8"))["rows"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def shard_path(folder: Path, split: str, shard: int) -> Path:
    """The file of a split's shard."""
    return folder / f"{split}-{shard:05d}.bin"


def write_layout(folder: Path, split: str, layout: Layout) -> dict[str, Any]:
    """Writes which shard has which row; returns the rest as JSON, less the lengths, which follow from encoded rows."""
    np.save(folder / f"{split}.shards.npy", layout.shard_of, allow_pickle=False)
    return {k: v for k, v in asdict(layout).items() if k not in ("lengths", "shard_of")}


def read_layout(folder: Path, split: str, layout: Layout, written: Mapping[str, Any]) -> Layout:
    """`layout` with the shards that are in `folder`, of which `written` is what `write_layout` returned."""
    shard_of = np.load(folder / f"{split}.shards.npy", allow_pickle=False)
    return replace(layout, num_shards=written["num_shards"], shard_of=shard_of)
