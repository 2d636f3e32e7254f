"""Tokens kept on disk: encoded once, the same as fresh ones, and made anew whenever they would not be."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import BertConfig, BertModel, BertTokenizerFast

from dist_finetune.cache.tokens import STORE_FROM_ROWS, TokenStore, tokenizer_digest
from dist_finetune.data.tables import Tables, read_tables
from dist_finetune.data.text import TextRows, encode_text
from dist_finetune.plan import Plan, plan_run
from dist_finetune.spec_file import load_spec
from dist_finetune.topology import local_topology

NUM_ROWS = STORE_FROM_ROWS + 1
Encode = Callable[[], TextRows]


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Tables, BertTokenizerFast]:
    """A plan of a little over 10,000 short rows."""
    folder = tmp_path_factory.mktemp("tokens")
    (folder / "bert").mkdir()
    (folder / "bert" / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad"]))
    BertTokenizerFast.from_pretrained(folder / "bert").save_pretrained(folder / "bert")
    sizes = BertConfig(
        vocab_size=7, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=16,
    )  # fmt: skip
    BertModel(sizes).save_pretrained(folder / "bert")
    rows = "".join(f"{'good ' * (i % 5 + 1)}{i},{i % 2}\n" for i in range(NUM_ROWS))
    (folder / "rows.csv").write_text("text,label\n" + rows)
    (folder / "few.csv").write_text("text,label\ngood,0\nbad,1\n")
    data = {"train": str(folder / "rows.csv"), "validation": str(folder / "few.csv")}
    spec = load_spec(
        {"model": {"name": str(folder / "bert")}, "data": data, "name": "x", "output": str(folder / "runs")}
    )
    tables = read_tables(spec.data, spec.train.seed)
    return plan_run(spec, local_topology(), tables), tables, BertTokenizerFast.from_pretrained(folder / "bert")


def stored_at(planned: tuple[Plan, Tables, BertTokenizerFast], root: Path) -> tuple[TokenStore, list[int], Encode]:
    """A store in `root`, an encoding function, and a list that grows with each of its calls."""
    plan, tables, tokenizer = planned
    cache = plan.spec.cache.model_copy(update={"folder": str(root)})
    store = TokenStore(replace(plan, spec=plan.spec.model_copy(update={"cache": cache})), tokenizer)
    calls: list[int] = []

    def encode() -> TextRows:
        calls.append(1)
        return encode_text(tables.train, tokenizer, 16)

    return store, calls, encode


def assert_same(kept: TextRows, fresh: TextRows) -> None:
    assert len(kept) == NUM_ROWS
    for name in ("input_ids", "offsets", "labels"):
        a, b = getattr(kept, name), getattr(fresh, name)
        assert a.dtype == b.dtype
        assert np.array_equal(a, b)
        assert type(a) is np.ndarray
    assert kept.token_type_ids is None
    assert kept.num_truncated == fresh.num_truncated


def test_a_large_split_is_encoded_once(planned: tuple[Plan, Tables, BertTokenizerFast], tmp_path: Path) -> None:
    store, calls, encode = stored_at(planned, tmp_path)
    first, second = (store.rows("train", planned[1].train, encode) for _ in range(2))
    assert len(calls) == 1
    assert_same(first, encode())
    assert_same(second, encode())
    assert second[NUM_ROWS - 1]["input_ids"].tolist() == first[NUM_ROWS - 1]["input_ids"].tolist()
    with pytest.raises(IndexError):
        second[NUM_ROWS]


def test_a_small_split_is_not_kept(planned: tuple[Plan, Tables, BertTokenizerFast], tmp_path: Path) -> None:
    store, calls, encode = stored_at(planned, tmp_path)
    for _ in range(2):
        store.rows("validation", planned[1].validation, encode)
    assert len(calls) == 2
    assert list(tmp_path.iterdir()) == []


def test_another_split_or_tokenizer_has_an_entry_of_its_own(
    planned: tuple[Plan, Tables, BertTokenizerFast], tmp_path: Path
) -> None:
    store, calls, encode = stored_at(planned, tmp_path)
    other = BertTokenizerFast.from_pretrained(planned[0].card.location)
    other.add_tokens(["another"])
    store.rows("train", planned[1].train, encode)
    store.rows("test", planned[1].train, encode)
    TokenStore(store.plan, other).rows("train", planned[1].train, encode)
    assert len(calls) == len(list(tmp_path.glob("tokens-*"))) == 3


def test_what_a_call_cuts_or_pads_to_is_no_other_tokenizer(planned: tuple[Plan, Tables, BertTokenizerFast]) -> None:
    tokenizer = planned[2]
    before = tokenizer_digest(tokenizer)
    tokenizer("good bad", truncation=True, max_length=3, padding="max_length")
    assert tokenizer_digest(tokenizer) == before
    for other in ({"do_lower_case": False}, {"model_input_names": ["input_ids", "attention_mask"]}):
        assert tokenizer_digest(BertTokenizerFast.from_pretrained(planned[0].card.location, **other)) != before


@pytest.mark.parametrize("damage", ["cut", "empty", "gone", "garbled"])
def test_damaged_tokens_are_made_anew(
    planned: tuple[Plan, Tables, BertTokenizerFast], tmp_path: Path, damage: str
) -> None:
    store, calls, encode = stored_at(planned, tmp_path)
    store.rows("train", planned[1].train, encode)
    (file,) = tmp_path.glob("tokens-*/input_ids.npy")
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:500])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "gone":
        file.unlink()
    else:
        file.with_name("meta.json").write_text("{")
    assert_same(store.rows("train", planned[1].train, encode), encode())
    assert len(calls) == 3  # the first, the one that mends, and ours
    assert_same(store.rows("train", planned[1].train, encode), encode())
    assert len(calls) == 4


def test_without_a_place_each_run_encodes(planned: tuple[Plan, Tables, BertTokenizerFast], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    store, calls, encode = stored_at(planned, tmp_path / "file")
    for _ in range(2):
        assert_same(store.rows("train", planned[1].train, encode), encode())
    assert len(calls) == 4


def test_labels_of_tokens_are_kept_as_such(planned: tuple[Plan, Tables, BertTokenizerFast], tmp_path: Path) -> None:
    store, calls, encode = stored_at(planned, tmp_path)

    def tagged() -> TextRows:
        rows = encode()
        return replace(rows, labels=np.arange(len(rows.input_ids)), labels_are_of_tokens=True)

    for _ in range(2):
        row = store.rows("train", planned[1].train, tagged)[1]
        assert "label" not in row
        assert row["token_labels"].tolist() == list(range(4, 4 + len(row["input_ids"])))
    assert len(calls) == 1
    data = replace(store.plan.data, task="token-classification", classes=("O", "B"))
    TokenStore(replace(store.plan, data=data), store.tokenizer).rows("train", planned[1].train, tagged)
    assert len(calls) == 2
