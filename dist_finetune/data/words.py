"""Words as token numbers: sentences that are already split, each word's first token labelled with the word's tag."""

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from dist_finetune.data.text import ENCODE_ROWS, TextRows, marks_single_texts
from dist_finetune.errors import UserError
from dist_finetune.tasks.task import IGNORED_LABEL

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_words(table: Dataset, tokenizer: "PreTrainedTokenizerBase", max_length: int) -> TextRows:
    """The rows of a table with columns "words" and "label" (a tag for each word) as tokens cut to `max_length`,
    with token types where `encode_text` keeps them.

    Raises UserError for a tokenizer that can't say which word a token is of.
    """
    if not tokenizer.is_fast:
        raise UserError(
            f"task: token-classification needs a tokenizer that knows a token's word, and {type(tokenizer).__name__} "
            "does not (it is no fast tokenizer, with a tokenizer.json); choose another model"
        )
    with_types = "token_type_ids" in tokenizer.model_input_names and marks_single_texts(tokenizer)
    ids: list[NDArray[np.int32]] = []
    types: list[NDArray[np.uint8]] = []
    labels: list[NDArray[np.int64]] = []
    num_truncated = 0
    plain = table.with_format(None)
    for start in range(0, len(table), ENCODE_ROWS):
        rows = plain[start : start + ENCODE_ROWS]
        encoded = tokenizer(
            rows["words"],
            is_split_into_words=True,
            truncation=True,
            max_length=max_length,
            return_attention_mask=False,
            return_token_type_ids=with_types,
            verbose=False,
        )
        for i, tags in enumerate(rows["label"]):
            ids.append(np.asarray(encoded["input_ids"][i], np.int32))
            if with_types:
                types.append(np.asarray(encoded["token_type_ids"][i], np.uint8))
            labels.append(_first_token_labels(encoded.word_ids(i), tags))
            num_truncated += len(ids[-1]) >= max_length and bool(encoded.encodings[i].overflowing)
    offsets = np.cumsum([0, *map(len, ids)]).astype(np.int64)
    return TextRows(
        input_ids=np.concatenate(ids) if ids else np.zeros(0, np.int32),
        offsets=offsets,
        token_type_ids=np.concatenate(types) if types else None,
        labels=np.concatenate(labels) if labels else np.zeros(0, np.int64),
        num_truncated=num_truncated,
        labels_are_of_tokens=True,
    )


def count_labelled(rows: TextRows) -> NDArray[np.int64]:
    """Labelled tokens of each row, (N,): words that were cut off, or that have no token at all, don't count."""
    before = np.concatenate([[0], np.cumsum(rows.labels != IGNORED_LABEL)])
    return np.diff(before[rows.offsets]).astype(np.int64)


def _first_token_labels(words: Sequence[int | None], tags: Sequence[int]) -> NDArray[np.int64]:
    """A label for each token, given the number of its word (None for special tokens)."""
    previous = chain([None], words)
    return np.asarray(
        [tags[w] if w is not None and w != p else IGNORED_LABEL for w, p in zip(words, previous, strict=False)],
        np.int64,
    )
