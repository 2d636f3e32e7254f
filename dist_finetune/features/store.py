"""Features on disk: numbered safetensors shards a split, under a key of all that they depend on.

A shard is whole or not there, and does not depend on how many processes wrote it: a killed extraction goes on where it
was, also with another number of processes.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dist_finetune.errors import TrainingError, UserError
from dist_finetune.run_folder import write_json
from dist_finetune.tensor_files import write_tensors

Vectors = NDArray[np.float32]
Ids = NDArray[np.int64]


@dataclass(frozen=True)
class FeatureKey:
    """All that features depend on; equal keys mean the same features, so that they are computed once."""

    weights_sha256: str
    inputs_sha256: str
    """Of the token numbers of all rows; for images of the pixels' files and class names."""
    transform: str
    depths: tuple[str, ...]
    pool: str
    precision: str
    batch_size: int
    pass_tokens: int | None = None
    """Tokens of a batch at most, padding among them."""

    @property
    def digest(self) -> str:
        """Short hash that names the folder."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Store:
    """The features of one key in `folder`: `<split>/00000.safetensors` and on."""

    folder: Path
    key: FeatureKey

    def open(self) -> None:
        """Makes the folder, with the key's parts in key.json for people. Rank 0 only."""
        with _writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / "key.json", asdict(self.key))

    def path(self, split: str, shard: int) -> Path:
        return self.folder / split / f"{shard:05}.safetensors"

    def holds(self, split: str, shard: int, ids: Ids) -> bool:
        """True where the shard is whole and of exactly these rows."""
        try:
            with safe_open(self.path(split, shard), "np") as file:
                whole = {"ids", "labels", *self.key.depths} == set(file.keys())
                return whole and np.array_equal(file.get_tensor("ids"), ids)
        except (OSError, SafetensorError):
            return False

    def write(self, split: str, shard: int, tensors: Mapping[str, Tensor]) -> None:
        """Writes a shard: `ids` and `labels` (n,), and float32 (n, D) for each depth."""
        path = self.path(split, shard)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                write_tensors({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)  # there where the disk is full

    def shards(self, split: str, depth: str) -> Iterator[tuple[Ids, Vectors, Ids]]:
        """Row numbers (n,), features (n, D) and labels (n,), shard after shard."""
        for path in self.paths(split):
            yield _read(path, depth)

    def shard(self, split: str, number: int, depth: str) -> tuple[Ids, Vectors, Ids]:
        """One of them."""
        return _read(self.path(split, number), depth)

    def paths(self, split: str) -> Sequence[Path]:
        """The split's shards, in order."""
        return sorted((self.folder / split).glob("*.safetensors"))

    def read(self, split: str, depth: str, num_rows: int) -> tuple[Vectors, Ids]:
        """Features (N, D) and labels (N,) in dataset order. Raises UserError unless each row is there once."""
        parts = list(self.shards(split, depth))
        order = np.concatenate([ids for ids, _, _ in parts]) if parts else np.zeros(0, np.int64)
        if not np.array_equal(np.sort(order), np.arange(num_rows)):
            raise UserError(
                f"{self.folder / split}: holds {len(order)} of {num_rows} rows; all processes must see one disk "
                "(set output to a shared folder)"
            )
        back = np.argsort(order)
        vectors = np.concatenate([features for _, features, _ in parts])[back]
        labels = np.concatenate([labels for _, _, labels in parts])[back]
        return vectors, labels


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Raises TrainingError where a file can't be written, as on a full disk."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"{path}: features can't be written: {error}; a next start keeps what is there") from None


def _read(path: Path, depth: str) -> tuple[Ids, Vectors, Ids]:
    with safe_open(path, "np") as file:
        return file.get_tensor("ids"), file.get_tensor(depth), file.get_tensor("labels")


def key_value(value: Any) -> str:
    """A stable text of a dataclass or plain value, for a key."""
    return json.dumps(asdict(value) if hasattr(value, "__dataclass_fields__") else value, sort_keys=True)
