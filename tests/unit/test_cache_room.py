"""A cache that can't be filled or read: the run goes on without, as it would with `cache: off`."""

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import write_config
from material import Material, write_material

from dist_finetune.cache import fill
from dist_finetune.cache.entries import META, list_entries
from dist_finetune.plan import Plan
from dist_finetune.run import train
from dist_finetune.spec_file import load_spec


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return write_material(tmp_path_factory.mktemp("material"))


def log_of(material: Material, folder: Path) -> str:
    """Trains two steps from the first on, and returns what the run said."""
    changes: dict[str, Any] = {"train": {"max_steps": 2}, "shard": {"strategy": "ddp"}, "cache": "on"}
    path = write_config(folder / "job.yaml", material.text(**changes), name="job", output=str(folder))
    assert train(load_spec(str(path)), fresh=True).steps == 2
    return (folder / "job" / "log.txt").read_text(encoding="utf-8")


def test_a_model_that_no_device_could_hold_is_not_moved_to_one(
    material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Plan, "is_larger_than_device", True)
    said = log_of(material, tmp_path)
    assert "note: no cache: the whole model, which fills it, is larger than a GPU" in said
    assert "cache built" not in said


def test_a_fill_that_runs_out_of_memory_ends_the_fill_alone(
    material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prefix_of(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(fill, "prefix_of", prefix_of)
    said = log_of(material, tmp_path)
    assert "note: no cache: filling it runs out of a GPU's memory; train.eval_batch_size has its rows" in said


@pytest.mark.parametrize("damage", ["cut", "empty", "gone", "garbled"])
def test_an_entry_that_is_damaged_is_left_alone_and_named(material: Material, tmp_path: Path, damage: str) -> None:
    log_of(material, tmp_path)
    (entry,) = list_entries(tmp_path / ".cache")
    file, shards, meta = (tmp_path / ".cache" / entry.key / n for n in ("train-00000.bin", "train.shards.npy", META))
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-4])
    elif damage == "empty":
        shards.write_bytes(b"")
    elif damage == "gone":
        file.unlink()
    else:
        meta.write_text('{"source": "x"}', encoding="utf-8")
    assert f"note: no cache: {tmp_path / '.cache' / entry.key} is damaged (" in log_of(material, tmp_path)


def test_what_is_left_of_an_entry_that_was_being_evicted_is_in_nobodys_way(material: Material, tmp_path: Path) -> None:
    log_of(material, tmp_path)
    (entry,) = list_entries(tmp_path / ".cache")
    (tmp_path / ".cache" / entry.key / META).unlink()
    assert "cache built" in log_of(material, tmp_path)
    assert [found.key for found in list_entries(tmp_path / ".cache")] == [entry.key]


def test_a_disk_that_is_full_at_the_end_of_a_fill_leaves_the_run_without_a_cache(
    material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_layout(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(fill, "write_layout", write_layout)
    said = log_of(material, tmp_path)
    assert "can't be written: No space left on device" in said
    assert "cache built" not in said
