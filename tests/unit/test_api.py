"""The entry points from Python stay what they are documented to be, whatever was imported before."""

import importlib
import subprocess
import sys

import pytest


@pytest.mark.parametrize("name", ["load_spec", "make_plan", "train"])
def test_entry_points_are_functions_even_after_a_run(name: str) -> None:
    importlib.import_module("dist_finetune.run")
    assert callable(getattr(importlib.import_module("dist_finetune"), name))


def test_importing_the_package_loads_neither_torch_nor_transformers() -> None:
    code = "import sys, dist_finetune; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_an_unknown_name_is_an_attribute_error() -> None:
    package = importlib.import_module("dist_finetune")
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        _ = package.trian
