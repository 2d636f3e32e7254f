"""The whole model is in host memory once a node, and every rank has the same one that it would have loaded alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import finish, read_json, torchrun
from transformers import BertConfig, BertModel, BertTokenizerFast

from dist_finetune.data.tables import read_tables
from dist_finetune.plan import plan_run
from dist_finetune.spec_file import load_spec
from dist_finetune.topology import Topology

pytestmark = pytest.mark.dist

WORKER = Path(__file__).with_name("load_worker.py")
Loads = list[dict[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A large BERT in bf16 as `good`, the same cut short as `damaged`."""
    folder = tmp_path_factory.mktemp("load")
    config = BertConfig(vocab_size=40_000, hidden_size=768, num_hidden_layers=3, intermediate_size=3072)
    with torch.device("meta"):
        model = BertModel(config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.normal_(0, 0.02)
    for name in ("good", "damaged"):
        model.save_pretrained(folder / name)
        words = "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "word"])
        (folder / name / "vocab.txt").write_text(words, encoding="utf-8")
        BertTokenizerFast.from_pretrained(folder / name).save_pretrained(folder / name)
    weights = folder / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: 10**6])
    return folder


@pytest.fixture(scope="module")
def loads(folder: Path) -> Loads:
    """What each of two ranks saw."""
    done = finish([*torchrun(2), str(WORKER), str(folder), str(folder / "results.json")], 120, folder)
    assert done.returncode == 0, done.stderr[-4000:]
    return [read_json(folder / f"results.json.{rank}") for rank in (0, 1)]


def test_the_model_is_in_memory_once(loads: Loads) -> None:
    reading, mapping = (rank["good"] for rank in loads)
    assert mapping["bytes"] > 200e6
    assert mapping["grown"] < mapping["bytes"] / 20
    assert reading["grown"] < mapping["bytes"] * 0.6  # what the allocator kept of its own copy
    assert reading["problem"] is mapping["problem"] is None
    assert min(reading["grown alone"], mapping["grown alone"]) > mapping["bytes"] * 0.9


def test_a_load_takes_no_more_host_memory_than_planned(loads: Loads, folder: Path) -> None:
    """At any moment, by both ranks together; pages of a file that are mapped count, too."""
    rows, data = [f"word {i},{'ab'[i % 2]}" for i in range(9)], folder / "rows.csv"
    data.write_text("\n".join(["text,label", *rows]), encoding="utf-8")
    spec = load_spec({"name": "x", "model": {"name": str(folder / "good")}, "data": {"train": str(data)}})
    planned = plan_run(spec, Topology(1, 2), read_tables(spec.data, 0)).costs.host_bytes_per_node
    grown = [rank["good"]["grown at most"] for rank in loads]
    assert planned / 2 < sum(grown) <= planned


@pytest.mark.parametrize("name", ["good", "tied", "hidden", "full", "no folder"])
def test_every_rank_has_the_model_that_it_would_have_loaded(loads: Loads, name: str) -> None:
    for rank in loads:
        found = rank[name]
        assert found["same names"]
        assert found["differ"] == found["flags differ"] == []
        assert found["same provenance"]
        assert found["training"]
        assert found["tied"] == (name != "good")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("hidden", "neither parameters nor buffers"),
        ("full", "can't take it ([Errno 27]"),
        ("no folder", "TMPDIR names another"),
    ],
)
def test_what_cannot_be_shared_is_loaded_by_each_and_told(loads: Loads, name: str, words: str) -> None:
    first, second = (rank[name]["problem"] for rank in loads)
    assert first == second
    assert words in first


def test_a_damaged_file_is_refused_on_every_rank(loads: Loads) -> None:
    first, second = (rank["damaged"]["error"] for rank in loads)
    assert first == second
    assert "can't be read" in first


def test_what_a_checkpoint_changes_is_in_memory_once_too(loads: Loads) -> None:
    for rank in loads:
        for name in ("resumed", "resumed tied", "resumed hidden"):
            assert rank[name]["same objects"]
            assert rank[name]["differ"] == rank[name]["moved"] == [], name
    assert loads[1]["resumed"]["bytes"] > 90e6
    assert loads[1]["resumed"]["grown"] < loads[1]["resumed"]["bytes"] / 10


def test_nothing_is_left_behind(loads: Loads) -> None:
    assert loads[0]["left"] == {"files": []}
