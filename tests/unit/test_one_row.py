"""BatchNorm that trains on one row alone: refused in the plan exactly where torch would raise, with what works."""

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml

from dist_finetune.data.batches import training_steps
from dist_finetune.errors import UserError
from dist_finetune.one_row import refuse_one_value_a_channel
from dist_finetune.plan import make_plan
from dist_finetune.spec_file import load_spec
from dist_finetune.topology import Topology

LAYOUTS = [(global_size, micro, world) for world in (1, 2) for global_size in (4, 8) for micro in (1, 2, 4)]


def write_config(folder: Path, image_size: int = 32, **changes: Any) -> Path:
    """A small ResNet from random weights on drawn digits; `changes` are top-level keys."""
    config = {
        "model": {"name": "timm:test_resnet", "weights": "none"},
        "data": {"train": "builtin:digits", "image_size": image_size, "max_rows": 41},
        "train": {"epochs": 2, "global_batch_size": 8, "precision": "fp32"},
        "track": {"wandb": "off"},
        **changes,
    }
    path = folder / "c.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def refusal(path: Path, topology: Topology, *overrides: str) -> str | None:
    try:
        make_plan(load_spec(path, list(overrides)), topology)
    except UserError as error:
        return str(error)
    return None


def torch_refuses(num_rows: int, global_size: int, micro: int, world: int) -> bool:
    """Whether some micro-batch of the real sample order is one row, which torch's own model does not take."""
    sizes = {
        len(part.ids)
        for rank in range(world)
        for step in training_steps(num_rows, global_size, micro, 2 * -(-num_rows // global_size), 0, rank, world)
        for part in step.micro_batches
    }
    model = timm.create_model("test_resnet", num_classes=10).train()
    try:
        model(torch.zeros(min(sizes), 3, 32, 32))
    except ValueError:
        return True
    return False


def test_it_refuses_where_torch_would_and_nowhere_else(tmp_path: Path) -> None:
    plan = make_plan(
        load_spec(write_config(tmp_path), ["train.global_batch_size=12", "train.epochs=20"]), Topology(1, 1, "cpu")
    )
    with torch.device("meta"):
        model = timm.create_model("test_resnet", num_classes=10)
    found = []
    for num_rows, (size, micro, world) in itertools.product((36, 37, 41), LAYOUTS):
        if size // world % micro == 0:
            expected = torch_refuses(num_rows, size, micro, world)
            try:
                refuse_one_value_a_channel(
                    model, lambda rows: torch.zeros(rows, 3, 32, 32), plan.phases, num_rows, size, micro, world, "cpu"
                )
                refused = False
            except UserError:
                refused = True
            assert refused == expected, (num_rows, size, micro, world)
            found.append(refused)
    assert len(found) == 33
    assert set(found) == {True, False}


def test_what_it_names_works(tmp_path: Path) -> None:
    topology = Topology(1, 2, "cpu")
    said = refusal(write_config(tmp_path), topology, "train.micro_batch_size=1")
    assert said is not None
    assert "leaves a process one row, where " in said
    ways = [dict(re.findall(r"(train\.\w+|freeze\.\w+): (\w+)", way)) for way in re.split(", or |, ", said)]
    ways = [way for way in ways if way]
    assert ways[-1] == {"freeze.rule": "norms"}
    for way in ways:
        asked = {"train.micro_batch_size": "1", **way}
        assert refusal(tmp_path / "c.yaml", topology, *(f"{key}={value}" for key, value in asked.items())) is None


@pytest.mark.parametrize(
    ("topology", "overrides"),
    [
        (Topology(1, 1, "cpu"), ["data.image_size=64"]),
        (Topology(1, 1, "cpu"), ["freeze.rule=norms"]),
        (Topology(1, 2, "cuda", 80 * 2**30), []),
    ],
    ids=["several values in a row", "BatchNorm frozen", "GPUs normalise together"],
)
def test_it_says_nothing_where_one_row_is_enough(tmp_path: Path, topology: Topology, overrides: list[str]) -> None:
    assert refusal(write_config(tmp_path), topology, "train.micro_batch_size=1", *overrides) is None


def test_it_says_nothing_of_a_model_that_can_not_be_run_without_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model_that_looks.py").write_text(
        "from torch import nn\n"
        "class Looks(nn.Sequential):\n"
        "    def forward(self, x):\n"
        "        x.numpy()\n"  # a TypeError on the meta device
        "        return super().forward(x)\n"
        "def looks(num_classes):\n"
        "    return Looks(nn.Flatten(), nn.Linear(3072, 8), nn.BatchNorm1d(8), nn.Linear(8, num_classes))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    path = write_config(tmp_path, model={"name": "model_that_looks:looks", "weights": "none"})
    assert refusal(path, Topology(1, 1, "cpu"), "train.micro_batch_size=1") is None
