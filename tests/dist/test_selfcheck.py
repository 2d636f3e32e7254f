"""`selfcheck` says yes where the numbers agree, and where they part."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import finish, write_config
from material import Material
from safetensors.torch import load_file, save_file

from dist_finetune.selfcheck import PLAINEST, _comparable, _shortened, compare_runs
from dist_finetune.spec import FreezeSpec
from dist_finetune.spec_file import load_spec

COMMAND = [sys.executable, "-m", "dist_finetune", "selfcheck"]


PHASES = [
    {"name": "head", "freeze": "backbone", "epochs": 5, "until": "plateau", "warmup": 50},
    {"name": "all", "freeze": {"embeddings": True}, "epochs": 9},
]


@pytest.mark.dist
@pytest.mark.parametrize(
    ("changes", "strategy", "frozen"),
    [
        ({"phases": PHASES, "freeze": None}, "fsdp", 5),
        pytest.param({"phases": "lp-ft"}, "zero2", 21, marks=pytest.mark.slow),
        pytest.param({"train": {"warmup": 100}}, "zero2", 21, marks=pytest.mark.slow),
    ],
)
def test_it_says_yes_and_leaves_nothing_behind(
    material: Material, tmp_path: Path, changes: dict[str, Any], strategy: str, frozen: int
) -> None:
    """Through all phases, too: what the first freezes and the second trains is no frozen tensor."""
    config = material.text(**changes, shard={"strategy": strategy})
    path = write_config(tmp_path / "c.yaml", config, output=str(tmp_path / "runs"))
    done = finish([*COMMAND, str(path), "--processes", "2", "--steps", "6"], 400, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"6 steps on 1 process with ddp and on 2 with {strategy}: yes, the same numbers" in done.stdout
    assert f"{frozen} frozen tensors compared byte for byte" in done.stdout
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.parametrize("freeze", ["backbone", {"rule": "backbone", "dtype": "bf16"}])
def test_what_it_sets_goes_with_every_way_to_write_a_freeze(material: Material, freeze: Any) -> None:
    phases = [{"name": "head", "freeze": freeze, "epochs": 5}]
    plain = material.text(freeze=None)
    for config in ({**plain, "name": "a", "freeze": freeze}, {**plain, "name": "b", "phases": phases}):
        spec = load_spec(config)
        again = load_spec(config, [*_comparable(spec, 5), *_shortened(spec, 5), *PLAINEST])
        freezes = [phase.freeze for phase in again.phases] or [again.freeze]
        assert freezes == [FreezeSpec(rule="backbone")]


def test_it_refuses_what_it_cannot_compare(material: Material, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.yaml", material.text(), output=str(tmp_path / "runs"))
    done = finish([*COMMAND, str(config), "--processes", "1"], 60, tmp_path)
    assert done.returncode == 2
    assert "give --processes 2 or more" in done.stderr


def write_run(
    folder: Path,
    *,
    loss: float = 1.0,
    lr: float = 1e-4,
    norm: float = 1.0,
    frozen: float = 1.0,
    weight: float = 1.0,
    logit: float = 0.0,
) -> Path:
    """A run's files as `compare_runs` reads them: two steps, one trained and one frozen tensor."""
    for name in ("model", "predictions"):
        (folder / name).mkdir(parents=True)
    rows = [{"step": s, "train/loss": loss if s == 2 else 2.0, "train/lr": lr, "train/grad_norm": norm} for s in (1, 2)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tensors = [{"name": "a", "frozen": False}, {"name": "b", "frozen": True}]
    (folder / "freeze.json").write_text(json.dumps({"phases": {"train": {"tensors": tensors}}}))
    (folder / "plan.json").write_text(json.dumps({"strategy": "zero2"}))
    save_file({"a": torch.tensor([weight, 1.0]), "b": torch.full((2,), frozen)}, folder / "model" / "model.safetensors")
    save_file({"logits": torch.full((1, 2), logit)}, folder / "predictions" / "validation.safetensors")
    assert load_file(folder / "model" / "model.safetensors").keys() == {"a", "b"}
    return folder


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"loss": 1.0001}, "step 2: train/loss is 1.0001, alone 1"),
        ({"loss": float("nan")}, "step 2: train/loss is nan"),
        ({"lr": 2e-4}, "step 1: train/lr is 0.0002, alone 0.0001"),
        ({"norm": 1.001}, "step 1: train/grad_norm is 1.001, alone 1"),
        ({"weight": 1.001}, "weights after the last step differ by 1.0e-03"),
        ({"weight": float("nan")}, "weights after the last step differ by inf"),
        ({"frozen": 1.0 + 1e-7}, "b is frozen and differs"),
        ({"logit": 1e-3}, "logits after the last step differ by 1.0e-03"),
    ],
)
def test_it_says_where_two_runs_part(tmp_path: Path, changes: dict[str, float], words: str) -> None:
    alone, several = write_run(tmp_path / "alone"), write_run(tmp_path / "several", **changes)
    found = compare_runs(alone, several, 2, "cpu")
    assert found.parted is not None
    assert words in found.parted
    assert f"NO: {found.parted}" in found.lines()
    assert ("by rounding alone" in found.lines()) == (
        not changes.keys() & {"lr", "frozen"} and words != "step 2: train/loss is nan"
    )
    assert compare_runs(alone, alone, 2, "cpu").parted is None


def test_a_step_that_one_run_left_out_is_told(tmp_path: Path) -> None:
    """Its row has no gradient norm. Where both left it out they agree."""
    alone, several = write_run(tmp_path / "alone"), write_run(tmp_path / "several")
    for run in (alone, several):
        file = run / "metrics.jsonl"
        file.write_text(file.read_text().replace(', "train/grad_norm": 1.0', "", 1))
        found, back = compare_runs(alone, several, 2, "cpu"), compare_runs(several, alone, 2, "cpu")
        assert found.parted == back.parted == ("the runs took other steps" if run == alone else None)
