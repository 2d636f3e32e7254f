"""Encoded text equals what the tokenizer gives row by row; batches are padded as models expect."""

from dataclasses import replace
from itertools import pairwise
from typing import Literal

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import CanineTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dist_finetune.data import text
from dist_finetune.data.encode import encode_table
from dist_finetune.data.text import collate_text, encode_text
from dist_finetune.errors import UserError
from dist_finetune.plan import DataPlan

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghij"]
SENTENCES = ["a b c", "d", "e f g h i j a b", "", "a b c d e f"]
TABLE = Dataset.from_dict({"text": SENTENCES, "label": [0, 1, 0, 1, 0]})
PAIRS = TABLE.add_column("text_pair", ["j", "a b", "c d e", "f", "g"])


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", model_input_names=names
    )


@pytest.mark.parametrize("rows_a_call", [2, 4096])
@pytest.mark.parametrize("pairs", [False, True])
def test_rows_are_the_tokenizers_own(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, rows_a_call: int, pairs: bool
) -> None:
    monkeypatch.setattr(text, "ENCODE_ROWS", rows_a_call)
    table = PAIRS if pairs else TABLE
    rows = encode_text(table, tokenizer, max_length=8)
    assert len(rows) == 5
    for i, (row, source) in enumerate(zip(rows, table, strict=True)):
        texts = [source["text"], source["text_pair"]] if pairs else [source["text"]]
        expected = tokenizer(*texts, truncation=True, max_length=8)
        assert row["input_ids"].tolist() == expected["input_ids"]
        assert row["label"] == source["label"]
        assert ("token_type_ids" in row) == pairs
        if pairs:
            assert row["token_type_ids"].tolist() == expected["token_type_ids"]
        assert rows.lengths[i] == len(expected["input_ids"])
    # 10 tokens of the third row; of pairs, 14 of the third and 10 of the fifth.
    assert rows.num_truncated == (2 if pairs else 1)
    with pytest.raises(IndexError):
        rows[5]


def test_token_types_of_single_texts_are_kept_where_they_say_something() -> None:
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing(single="$A [CLS]:2", special_tokens=[("[CLS]", 2)])  # as XLNet has it
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, model_input_names=["input_ids", "token_type_ids"])
    assert encode_text(TABLE, tokenizer, max_length=14)[0]["token_type_ids"].tolist() == [0, 0, 0, 2]


def test_a_tokenizer_in_plain_python_counts_truncated_rows_too() -> None:
    rows = encode_text(TABLE, CanineTokenizer(), max_length=7)
    assert rows.num_truncated == 2  # "a b c" fills the 7 exactly
    assert rows.lengths.tolist() == [7, 3, 7, 2, 7]


def test_batches_are_padded_to_a_multiple(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = encode_text(PAIRS, tokenizer, max_length=14)
    batch = collate_text([rows[0], rows[1]], pad_token_id=9)
    expected = tokenizer(["a b c", "d"], ["j", "a b"], padding=True, pad_to_multiple_of=8, return_tensors="pt")
    inputs = batch["inputs"]
    assert inputs["input_ids"].shape == (2, 8)
    assert batch["labels"].tolist() == [0, 1]
    assert all(column.dtype == torch.int64 for column in [*inputs.values(), batch["labels"]])
    assert torch.equal(inputs["attention_mask"], expected["attention_mask"])
    assert torch.equal(inputs["token_type_ids"], expected["token_type_ids"])
    assert torch.equal(inputs["input_ids"], expected["input_ids"].masked_fill(expected["attention_mask"] == 0, 9))
    assert collate_text([rows[2]], 0)["inputs"]["input_ids"].shape == (1, 16)
    assert collate_text([rows[2]], 0, max_length=14)["inputs"]["input_ids"].shape == (1, 14)


@pytest.mark.parametrize(("device", "width"), [("cuda", 8), ("cpu", 5)])
def test_only_a_gpu_has_batches_padded_to_eights(
    tokenizer: PreTrainedTokenizerBase, device: Literal["cpu", "cuda"], width: int
) -> None:
    data = DataPlan({}, ("0", "1"), "text", ("text",), ("label",), "", 14, None, 0)
    rows = encode_table(TABLE, data, None, device, tokenizer)
    assert rows.first_batch()["inputs"]["input_ids"].shape == (2, width)


@pytest.mark.parametrize(("table", "num_special"), [(TABLE, 2), (PAIRS, 3)])
def test_a_length_without_room_for_text_is_refused(
    tokenizer: PreTrainedTokenizerBase, table: Dataset, num_special: int
) -> None:
    """Some tokenizers then cut nothing, others leave their own tokens alone."""
    data = DataPlan({}, ("0", "1"), "text", ("text",), ("label",), "", num_special, None, 0)
    with pytest.raises(UserError, match=rf"data\.max_length: {num_special} leaves no room.* adds {num_special} tokens"):
        encode_table(table, data, None, "cpu", tokenizer)
    rows = encode_table(table, replace(data, max_length=num_special + 2), None, "cpu", tokenizer)
    assert rows.lengths is not None
    assert max(rows.lengths) == num_special + 2


def test_left_padding(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = encode_text(TABLE, tokenizer, max_length=14)
    inputs = collate_text([rows[1]], 0, padding_side="left")["inputs"]
    assert inputs["input_ids"].tolist() == [[0, 0, 0, 0, 0, 2, 7, 3]]
    assert inputs["attention_mask"].tolist() == [[0] * 5 + [1] * 3]


def test_arrays_are_packed(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = encode_text(TABLE, tokenizer, max_length=14)
    assert rows.input_ids.dtype == np.int32
    assert rows.offsets[-1] == len(rows.input_ids) == sum(rows.lengths)
    assert all(b > a for a, b in pairwise(rows.offsets))
