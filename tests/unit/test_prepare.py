"""What `prepare` takes as remote, and what it makes of weight files; the whole command is in tests/dist."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertModel

from dist_finetune import prepare
from dist_finetune.advise.costs import merged
from dist_finetune.cache.tokens import TokenStore
from dist_finetune.data.sources import hub_parts
from dist_finetune.data.tables import read_tables
from dist_finetune.data.text import TextRows
from dist_finetune.errors import UserError
from dist_finetune.features.bare import without_training
from dist_finetune.models.fetch import count_tensors, weight_files
from dist_finetune.models.sources import describe_model, load_tokenizer
from dist_finetune.plan import plan_run
from dist_finetune.prepare import Item, place_of, remote_names
from dist_finetune.spec import ModelSpec, Spec
from dist_finetune.topology import Topology

TINY = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """A BERT whose weights are in three shards."""
    BertModel(BertConfig(**TINY)).save_pretrained(tmp_path / "bert", max_shard_size="4KB")
    assert len(list((tmp_path / "bert").glob("model-*.safetensors"))) > 2
    return tmp_path / "bert"


def spec_of(model: dict[str, Any], train: str) -> Spec:
    return Spec.model_validate({"model": model, "data": {"train": train}, "name": "n"})


@pytest.mark.parametrize(
    ("item", "hub_id"),
    [
        ("nyu-mll/glue:sst2[validation]", "nyu-mll/glue"),
        ("imdb", "imdb"),
        ("rows.csv", None),
        ("builtin:topics", None),
        ("here", None),
        ("here[train]", None),
        ("here/missing", None),
        ("./imdb", None),
        ("~/imdb", None),
    ],
)
def test_only_what_can_be_nothing_else_is_a_hub_id(
    item: str, hub_id: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    found = hub_parts(item)
    assert (found and found["id"]) == hub_id


@pytest.mark.parametrize(
    ("model", "train", "expected"),
    [
        ({"name": "demo:minilm"}, "builtin:topics", []),
        ({"name": "demo:efficientnet-lite0"}, "builtin:digits", []),
        ({"name": "demo:minilm"}, "ag_news", ["ag_news"]),
        ({"name": "timm:resnet18"}, "builtin:digits", ["timm:resnet18"]),
        ({"name": "timm:resnet18", "weights": "none"}, "builtin:digits", []),
        ({"name": "torchvision:resnet18"}, "owner/images:all", ["torchvision:resnet18", "owner/images:all"]),
    ],
)
def test_what_comes_over_a_network_is_named(model: dict[str, Any], train: str, expected: list[str]) -> None:
    assert remote_names(spec_of(model, train)) == expected


def test_files_from_several_places_have_one_that_holds_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """data.train: train.csv beside data.validation: /elsewhere/validation.csv."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert place_of([Path("train.csv")]) == "train.csv"
    assert place_of([Path("train.csv"), tmp_path / "there" / "validation.csv"]) == str(tmp_path)
    assert place_of([Path("train.csv"), Path("more/test.csv")]) == str(tmp_path / "here")


def test_all_shards_are_needed_and_their_tensors_counted(bert: Path) -> None:
    spec = ModelSpec(name=str(bert))
    files = weight_files(describe_model(spec), spec)
    expected = len(BertModel(BertConfig(**TINY)).state_dict())
    assert sum(count_tensors(path) for path in files) == expected
    assert Item("weights", "", tuple(files)).num_bytes == sum(path.stat().st_size for path in files)
    files[1].unlink()
    with pytest.raises(UserError, match=rf"of {len(files)} files"):
        weight_files(describe_model(spec), spec)


def test_weights_of_a_file_or_none_need_nothing_else(bert: Path, tmp_path: Path) -> None:
    for path in bert.glob("model*"):
        path.unlink()
    none, file = ModelSpec(name=str(bert), weights="none"), tmp_path / "w.safetensors"
    save_file({"a": torch.ones(2)}, file)
    assert weight_files(describe_model(none), none) == []
    named = ModelSpec(name=str(bert), weights=str(file))
    assert weight_files(describe_model(named), named) == [file]
    with pytest.raises(UserError, match="holds a config but no weights"):
        weight_files(describe_model(none), ModelSpec(name=str(bert)))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_cut_file_is_found_by_its_header(tmp_path: Path, suffix: str) -> None:
    whole, cut = tmp_path / f"w{suffix}", tmp_path / f"cut{suffix}"
    tensors = {"a": torch.ones(100), "b": torch.ones(3)}
    if suffix == ".pt":
        torch.save(tensors, whole)
    else:
        save_file(tensors, whole)
    assert count_tensors(whole) == 2
    shutil.copy(whole, cut)
    cut.write_bytes(whole.read_bytes()[:-50])
    with pytest.raises(UserError, match="truncated"):
        count_tensors(cut)


def test_tensors_of_a_torch_file_are_counted_as_a_run_reads_them(tmp_path: Path) -> None:
    nested, pointer = tmp_path / "nested.pt", tmp_path / "pytorch_model.bin"
    torch.save({"state_dict": {"a": torch.ones(100), "b": torch.ones(3)}, "epoch": 3}, nested)
    assert count_tensors(nested) == 2
    pointer.write_text("version https://git-lfs.github.com/spec/v1\n")  # of a clone without git-lfs
    with pytest.raises(UserError, match=r"holds more than tensors, or is damaged.* as \.safetensors$"):
        count_tensors(pointer)


def test_tokens_are_prepared_where_the_run_looks_for_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a training or of a feature run, and whether or not this machine could do what is asked of the run's own."""
    monkeypatch.setattr("dist_finetune.cache.tokens.STORE_FROM_ROWS", 10)
    monkeypatch.setattr("dist_finetune.combinations.has_compiler", lambda device: False)
    (tmp_path / "rows.csv").write_text("text,label\n" + "".join(f"row {i},{'ab'[i % 2]}\n" for i in range(40)))
    config = {
        "model": {"name": "demo:minilm"}, "data": {"train": str(tmp_path / "rows.csv")}, "name": "run",
        "output": str(tmp_path / "runs"), "cache": {"folder": str(tmp_path / "fast")}, "train": {"compile": True},
    }  # fmt: skip
    spec = Spec.model_validate(config)
    tables = read_tables(spec.data, 0)
    tokenizer = load_tokenizer(describe_model(spec.model))
    item = prepare._tokens_item(spec, tables, tokenizer)
    assert {path.parent.parent for path in item.files} == {tmp_path / "fast"}

    def encode() -> TextRows:
        raise AssertionError("the tokens are not found")

    on_gpus = Topology(1, 2, "cuda", is_seen=False)
    for plan in (plan_run(spec, on_gpus, tables), plan_run(without_training(spec, 2), on_gpus, tables)):
        assert len(TokenStore(plan, tokenizer).rows("train", tables.train, encode)) == len(tables.train)
    merged_spec = merged(spec, {"task": "features", "features": {}})
    assert (merged_spec.cache.mode, merged_spec.cache.folder) == ("off", str(tmp_path / "fast"))
