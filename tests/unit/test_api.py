"""The entry points from Python stay what they are documented to be, whatever was imported before."""

import importlib
import os
import subprocess
import sys

import pytest
import torch.distributed as dist

from dist_finetune.spec import LaunchSpec
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
    heavy = ("timm", "sklearn", "matplotlib", "torchmetrics", "deepspeed", "wandb", "transformers.modeling_utils")
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
