"""Words as tokens: each word's first token carries its tag, everything else none."""

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import BertTokenizerFast, CanineTokenizer, PreTrainedTokenizerFast

from dist_finetune.data.text import collate_text
from dist_finetune.data.words import count_labelled, encode_words
from dist_finetune.errors import UserError

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "in", "os", "##lo", "to", "##day"]
TABLE = Dataset.from_dict(
    {"words": [["in", "oslo"], ["today", "in", "oslo"], ["\u200b", "in"]], "label": [[7, 8], [1, 2, 3], [4, 5]]}
)


@pytest.fixture
def tokenizer(tmp_path: Path) -> BertTokenizerFast:
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY), encoding="utf-8")
    return BertTokenizerFast.from_pretrained(tmp_path)


def test_first_tokens_are_labelled(tokenizer: BertTokenizerFast) -> None:
    rows = encode_words(TABLE, tokenizer, max_length=16)
    assert len(rows) == 3
    assert tokenizer.convert_ids_to_tokens(rows[1]["input_ids"]) == [
        "[CLS]",
        "to",
        "##day",
        "in",
        "os",
        "##lo",
        "[SEP]",
    ]
    assert rows[1]["token_labels"].tolist() == [-100, 1, -100, 2, 3, -100, -100]
    assert rows[2]["token_labels"].tolist() == [-100, 5, -100]  # a word without a token has no label
    assert count_labelled(rows).tolist() == [2, 3, 1]
    assert rows.num_truncated == 0


def test_words_behind_the_maximum_length_do_not_count(tokenizer: BertTokenizerFast) -> None:
    rows = encode_words(TABLE, tokenizer, max_length=5)
    assert rows[1]["token_labels"].tolist() == [-100, 1, -100, 2, -100]
    assert count_labelled(rows).tolist() == [2, 2, 1]
    assert rows.num_truncated == 1


@pytest.mark.parametrize("side", ["right", "left"])
def test_batches_pad_labels_like_tokens(tokenizer: BertTokenizerFast, side: str) -> None:
    rows = encode_words(TABLE, tokenizer, max_length=16)
    batch = collate_text([rows[0], rows[1]], 0, multiple_of=1, padding_side=side)
    padding = [-100] * 2
    first = [-100, 7, 8, -100, -100]
    assert batch["labels"].dtype == torch.int64
    assert batch["labels"][0].tolist() == (first + padding if side == "right" else padding + first)
    assert batch["labels"].shape == batch["inputs"]["input_ids"].shape == (2, 7)
    is_real = batch["inputs"]["attention_mask"] == 1
    assert (batch["labels"][~is_real] == -100).all()


def test_the_same_word_twice_is_two_words() -> None:
    plain = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    table = Dataset.from_dict({"words": [["a", "a a", "a"]], "label": [[1, 2, 3]]})
    rows = encode_words(table, PreTrainedTokenizerFast(tokenizer_object=plain), max_length=9)
    assert rows[0]["token_labels"].tolist() == [1, 2, -100, 3]
    assert np.array_equal(rows.lengths, [4])


def test_token_types_are_kept_where_they_say_something(tokenizer: BertTokenizerFast) -> None:
    assert encode_words(TABLE, tokenizer, max_length=16).token_type_ids is None
    plain = Tokenizer(models.WordLevel({"a": 0, "?": 1, "[CLS]": 2}, unk_token="?"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    plain.post_processor = TemplateProcessing(single="$A [CLS]:2", special_tokens=[("[CLS]", 2)])  # as XLNet has it
    marking = PreTrainedTokenizerFast(tokenizer_object=plain, model_input_names=["input_ids", "token_type_ids"])
    rows = encode_words(TABLE, marking, max_length=9)
    assert rows[0]["token_type_ids"].tolist() == [0, 0, 2]
    assert len(rows.token_type_ids) == len(rows.input_ids)


def test_a_tokenizer_without_word_numbers_is_refused() -> None:
    with pytest.raises(UserError, match="CanineTokenizer does not"):
        encode_words(TABLE, CanineTokenizer(), max_length=16)
