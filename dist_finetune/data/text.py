"""Text as token numbers: a whole split tokenised once into flat arrays, and batches padded from them."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor

from dist_finetune.data.targets import label_array, stacked_labels
from dist_finetune.tasks.names import TaskName
from dist_finetune.tasks.task import IGNORED_LABEL

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

ENCODE_ROWS = 4096  # rows a tokenizer call takes: enough to keep its threads busy, few enough to bound its Python lists


@dataclass(frozen=True, eq=False)
class TextRows(torch.utils.data.Dataset[dict[str, Any]]):
    """Encoded rows; row i is `input_ids[offsets[i]:offsets[i + 1]]`, cut to the maximum length in `num_truncated` rows.

    Indexing gives `{"input_ids": int32 (T,), ["token_type_ids": uint8 (T,),] "label"}`, or in the place of the last
    `"token_labels": int64 (T,)`.
    """

    input_ids: NDArray[np.int32]
    offsets: NDArray[np.int64]
    token_type_ids: NDArray[np.uint8] | None
    labels: NDArray[Any]
    """One a row, see `label_array`; or one a token, laid out as `input_ids`."""
    num_truncated: int
    labels_are_of_tokens: bool = False

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each row, (N,)."""
        return np.diff(self.offsets).astype(np.int32)

    @property
    def sha256(self) -> str:
        """Hash of all that a model is given: token numbers and types, row by row."""
        total = hashlib.sha256()
        for array in (self.input_ids, self.offsets, self.token_type_ids):
            if array is not None:
                total.update(array.data)  # without a copy of all tokens
        return total.hexdigest()

    def __getitem__(self, index: int) -> dict[str, Any]:
        num_rows = len(self.offsets) - 1
        if not -num_rows <= index < num_rows:
            raise IndexError(f"row {index} of {num_rows}")  # the slices below would give an empty row
        index = index % num_rows
        span = slice(self.offsets[index], self.offsets[index + 1])
        row: dict[str, Any] = {"input_ids": self.input_ids[span]}
        if self.labels_are_of_tokens:
            row["token_labels"] = self.labels[span]
        else:
            row["label"] = self.labels[index]
        if self.token_type_ids is not None:
            row["token_type_ids"] = self.token_type_ids[span]
        return row


def encode_text(
    table: Dataset,
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    task: TaskName = "classification",
    num_outputs: int = 1,
) -> TextRows:
    """The rows of a table with columns "text", perhaps "text_pair", and "label", as tokens cut to `max_length`.

    Token types are kept for pairs, and for single texts where they aren't all zero, which models assume by themselves.
    """
    is_pair = "text_pair" in table.column_names
    with_types = "token_type_ids" in tokenizer.model_input_names and (is_pair or marks_single_texts(tokenizer))
    ids: list[NDArray[np.int32]] = []
    types: list[NDArray[np.uint8]] = []
    lengths: list[int] = []
    num_truncated = 0
    plain = table.with_format(None)
    for start in range(0, len(table), ENCODE_ROWS):
        rows = plain[start : start + ENCODE_ROWS]
        texts = (rows["text"], rows["text_pair"]) if is_pair else (rows["text"],)
        encoded = tokenizer(
            *texts,
            truncation=True,
            max_length=max_length,
            return_attention_mask=False,
            return_token_type_ids=with_types,
            verbose=False,
        )
        num_tokens = [len(row) for row in encoded["input_ids"]]
        ids.append(np.fromiter(chain.from_iterable(encoded["input_ids"]), np.int32, sum(num_tokens)))
        if with_types:
            types.append(np.fromiter(chain.from_iterable(encoded["token_type_ids"]), np.uint8, sum(num_tokens)))
        full = [i for i, count in enumerate(num_tokens) if count >= max_length]
        num_truncated += _count_truncated(encoded, full, tokenizer, texts, max_length)
        lengths += num_tokens
    return TextRows(
        input_ids=np.concatenate(ids) if ids else np.zeros(0, np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        token_type_ids=np.concatenate(types) if types else None,
        labels=label_array(table, task, num_outputs),
        num_truncated=num_truncated,
    )


def marks_single_texts(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether a single text has token types besides 0, as XLNet's has."""
    return any(tokenizer("a", return_token_type_ids=True)["token_type_ids"])


def _count_truncated(
    encoded: "BatchEncoding",
    full: Sequence[int],
    tokenizer: "PreTrainedTokenizerBase",
    texts: Sequence[Sequence[str]],
    max_length: int,
) -> int:
    """How many of the rows of `max_length` tokens lost some; a tokenizer in plain Python must be asked again."""
    if not full:
        return 0
    if encoded.encodings is not None:
        return sum(bool(encoded.encodings[i].overflowing) for i in full)
    whole = tokenizer(*([column[i] for i in full] for column in texts), truncation=False, verbose=False)
    return sum(len(row) > max_length for row in whole["input_ids"])


def collate_text(
    rows: Sequence[Mapping[str, Any]],
    pad_token_id: int,
    multiple_of: int = 8,
    max_length: int | None = None,
    padding_side: Literal["right", "left"] = "right",
) -> dict[str, Any]:
    """`{"inputs": {"input_ids", "attention_mask", ["token_type_ids"]}, "labels"}`: int64 (B, T) each, labels of rows
    as `stacked_labels` gives them, of tokens int64 (B, T).

    T is the longest row rounded up to `multiple_of`, but never above `max_length`. `padding_side` is the tokenizer's:
    models that read the last token, such as XLNet, need "left".
    """
    lengths = np.asarray([len(row["input_ids"]) for row in rows])
    longest = int(lengths.max())
    width = -(-longest // multiple_of) * multiple_of
    if max_length is not None:
        width = max(longest, min(width, max_length))
    places = np.arange(width)
    is_token = places < lengths[:, None] if padding_side == "right" else places >= width - lengths[:, None]

    def padded(name: str, padding: int) -> NDArray[np.int64]:
        column = np.full(is_token.shape, padding, np.int64)
        column[is_token] = np.concatenate([row[name] for row in rows])
        return column

    columns = {"input_ids": padded("input_ids", pad_token_id), "attention_mask": is_token.astype(np.int64)}
    if "token_type_ids" in rows[0]:
        columns["token_type_ids"] = padded("token_type_ids", 0)
    inputs: dict[str, Tensor] = {name: torch.from_numpy(column) for name, column in columns.items()}
    if "token_labels" in rows[0]:
        return {"inputs": inputs, "labels": torch.from_numpy(padded("token_labels", IGNORED_LABEL))}
    return {"inputs": inputs, "labels": stacked_labels(rows)}
