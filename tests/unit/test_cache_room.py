"""A cache whose fill has no room on a device: the run goes on without, as it would with `cache: off`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import write_config
from material import Material, write_material

from dist_finetune.cache import fill
from dist_finetune.plan import Plan
from dist_finetune.run import train
from dist_finetune.spec_file import load_spec


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return write_material(tmp_path_factory.mktemp("material"))


def log_of(material: Material, folder: Path) -> str:
    changes: dict[str, Any] = {"train": {"max_steps": 2}, "shard": {"strategy": "ddp"}, "cache": "on"}
    path = write_config(folder / "job.yaml", material.text(**changes), name="job", output=str(folder))
    assert train(load_spec(str(path))).steps == 2
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
