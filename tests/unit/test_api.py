"""The entry points from Python stay what they are documented to be, whatever was imported before."""

import importlib
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from material import write_material

from dist_finetune import run
from dist_finetune.engine import build
from dist_finetune.spec import LaunchSpec
from dist_finetune.spec_file import load_spec
from dist_finetune.world import join_world


@pytest.mark.parametrize("name", ["load_spec", "make_plan", "train"])
def test_entry_points_are_functions_even_after_a_run(name: str) -> None:
    importlib.import_module("dist_finetune.run")
    assert callable(getattr(importlib.import_module("dist_finetune"), name))


def test_importing_the_package_loads_neither_torch_nor_transformers() -> None:
    code = "import sys, dist_finetune; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_a_worker_imports_no_library_that_its_run_may_not_need() -> None:
    heavy = ("timm", "sklearn", "matplotlib", "torchmetrics", "deepspeed", "wandb", "transformers")
    code = f"import sys, dist_finetune.worker; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_an_unknown_name_is_an_attribute_error() -> None:
    package = importlib.import_module("dist_finetune")
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        _ = package.trian


def test_what_a_notebook_starts_after_a_run_is_no_rank_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", "29511")
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    before = dict(os.environ)
    with join_world(LaunchSpec()) as world:
        assert (world.world_size, os.environ["RANK"], os.environ["LOCAL_WORLD_SIZE"]) == (1, "0", "1")
        assert dist.is_initialized()
    assert dict(os.environ) == before
    assert not dist.is_initialized()


def test_runs_follow_each_other_in_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a notebook. Each makes a process group and closes it, of which engines keep copies: of this run's, which
    wait as long as it says, and not of the one before. None leaves torch other than it was."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    material = write_material(tmp_path)
    train = {"global_batch_size": 32, "max_steps": 2}
    more = {"cache": "off", "launch": {"timeout": "2 h"}, "track": {"wandb": "off"}}
    waits: list[tuple[str, timedelta]] = []
    linear = torch.nn.functional.linear
    check = build._check_held

    def look(engine: Any, strategy: str, *rest: Any) -> None:
        group = engine._zero.dp_process_group if strategy == "zero3" else dist.group.WORLD
        waits.append((strategy, group._get_backend(torch.device("cpu")).options._timeout))
        check(engine, strategy, *rest)

    monkeypatch.setattr(build, "_check_held", look)
    for number, strategy in enumerate(("zero3", "fsdp") * 2):
        config = material.text(train=train, shard={"strategy": strategy}, **more)
        spec = load_spec({**config, "name": f"run-{number}", "output": str(tmp_path / "runs")})
        assert run.train(spec).status == "finished"
        assert torch.nn.functional.linear is linear
    assert waits == [("zero3", timedelta(hours=2)), ("fsdp", timedelta(hours=2))] * 2
