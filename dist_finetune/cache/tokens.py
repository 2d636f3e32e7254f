"""Tokens of large splits, kept on disk: encoded once, by one process, and mapped by all others and by later runs.

<root>/tokens-<key>/meta.json     what they were made from
<root>/tokens-<key>/<field>.npy   the arrays of `TextRows`
"""

import contextlib
import dataclasses
import json
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tokenizers
from datasets import Dataset

from dist_finetune.cache.entries import META, cache_root, hash_of, make_room, touch
from dist_finetune.data.encode import encode_splits
from dist_finetune.data.loading import Rows
from dist_finetune.data.tables import Tables
from dist_finetune.data.text import TextRows
from dist_finetune.plan import Plan
from dist_finetune.run_folder import write_json
from dist_finetune.world import World, together

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STORE_FROM_ROWS = 10_000  # fewer are encoded in less than a second


def encode_once(
    plan: Plan, tables: Tables, tokenizer: "PreTrainedTokenizerBase | None", world: World
) -> dict[str, Rows]:
    """Rows of each split as `encode_splits` gives them; a large split of texts is tokenised by one process. Collective.

    The first rank goes first, then one rank of each node, which finds what the first wrote where they share a disk,
    then all others. Where nothing can be written, each encodes for itself.
    """
    keep = TokenStore(plan, tokenizer).rows if tokenizer else None
    encode = partial(encode_splits, plan, tables, tokenizer, keep)
    if not (keep and is_large(tables)):
        return together(encode)
    first = together(lambda: encode() if world.is_first else None)
    of_node = together(lambda: first or (encode() if world.local_rank == 0 else None))
    return together(lambda: of_node or encode())


def is_large(tables: Tables) -> bool:
    """Whether the tokens of a split are worth keeping."""
    return max(len(table) for table in tables.splits.values()) >= STORE_FROM_ROWS


@dataclass(frozen=True)
class TokenStore:
    """The tokens of one plan's data by one tokenizer."""

    plan: Plan
    tokenizer: "PreTrainedTokenizerBase"

    def rows(self, split: str, table: Dataset, encode: Callable[[], TextRows]) -> TextRows:
        """What `encode` returns for `table`; from the disk where it has been there before, and kept there if large."""
        if len(table) < STORE_FROM_ROWS:
            return encode()
        made_from = {
            "data": self.plan.data.fingerprint,
            "columns": self.plan.data.columns,
            "labels": [self.plan.data.task, *self.plan.data.classes],
            "max_length": self.plan.data.max_length,
            "tokenizer": tokenizer_digest(self.tokenizer),
            "split": split,
        }
        root = cache_root(self.plan.spec)
        folder = root / f"tokens-{hash_of(made_from)[:20]}"
        if (folder / META).exists():
            try:
                kept = _read(folder)
                touch(folder)
                return kept
            except (OSError, EOFError, ValueError, KeyError, TypeError):
                shutil.rmtree(folder, ignore_errors=True)  # damaged
        encoded = encode()
        with contextlib.suppress(OSError):  # no room or no permission: the next run encodes again
            _write(folder, encoded, self.plan, made_from)
            return _read(folder)
        return encoded


def tokenizer_digest(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Hash of everything that decides which tokens a text becomes; what the last call cut or padded to does not."""
    import transformers  # a run of images does without

    versions = [transformers.__version__, tokenizers.__version__, type(tokenizer).__name__]
    versions += tokenizer.model_input_names  # whether there are token types
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return hash_of([*versions, tokenizer.get_vocab(), repr(sorted(tokenizer.init_kwargs.items()))])
    content = json.loads(backend.to_str())
    return hash_of([*versions, {k: v for k, v in content.items() if k not in ("truncation", "padding")}])


def _write(folder: Path, encoded: TextRows, plan: Plan, made_from: dict[str, Any]) -> None:
    part = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    fields = {f.name: getattr(encoded, f.name) for f in dataclasses.fields(encoded)}
    arrays = {name: value for name, value in fields.items() if isinstance(value, np.ndarray)}
    numbers = {name: value for name, value in fields.items() if not isinstance(value, np.ndarray)}
    folder.parent.mkdir(parents=True, exist_ok=True)
    make_room(folder.parent, sum(a.nbytes for a in arrays.values()), plan.spec.cache.quota)
    try:
        part.mkdir()
        for name, array in arrays.items():
            np.save(part / f"{name}.npy", array, allow_pickle=False)
        told = {"source": f"tokens of {plan.card.name}", "made_from": made_from, "numbers": numbers}
        write_json(part / META, told)
        if not folder.exists():  # another job may have been faster
            part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _read(folder: Path) -> TextRows:
    numbers = json.loads((folder / META).read_text(encoding="utf-8"))["numbers"]
    # plain arrays over the map: a slice of numpy's own memmap type takes three times as long
    load = partial(np.load, mmap_mode="r", allow_pickle=False)
    arrays = {path.stem: load(path).view(np.ndarray) for path in folder.glob("*.npy")}
    return TextRows(**arrays, **numbers)
