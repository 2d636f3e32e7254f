"""One config under every launcher: the same numbers, bit for bit; what a launcher brings against it is refused."""

import os
import sys
from pathlib import Path

import pytest
import torch
from harness import REPOSITORY, Run, command, finish, ten_steps, write_config
from material import Material

pytestmark = pytest.mark.dist

BIN = Path(sys.executable).parent
ACCELERATE = [str(BIN / "accelerate"), "launch"]
CPU_2 = str(REPOSITORY / "launch" / "accelerate" / "cpu_2.yaml")
DEEPSPEED = [str(BIN / "deepspeed"), "--num_accelerators", "2", "--master_port", "29571"]
LAUNCHERS = {
    "run": [sys.executable, "-m", "dist_finetune", "run", "CONFIG", "--processes", "2"],
    "accelerate": [*ACCELERATE, "--config_file", CPU_2, "-m", "dist_finetune", "train", "CONFIG"],
    "accelerate-deepspeed": [
        *ACCELERATE, "--num_processes", "2", "--main_process_port", "0", "--use_deepspeed", "--zero_stage", "2",
        str(REPOSITORY / "launch" / "train.py"), "CONFIG",
    ],
    "deepspeed": [*DEEPSPEED, "--module", "dist_finetune", "train", "CONFIG"],
}  # fmt: skip


@pytest.fixture(scope="module")
def launched(material: Material, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """A run of 2 processes at ZeRO-2 by each launcher; one after the other."""
    folder = tmp_path_factory.mktemp("launched")
    found = {}
    for name, words in LAUNCHERS.items():
        path = ten_steps(material, folder, name)
        done = finish(
            [str(path) if word == "CONFIG" else word for word in words],
            200,
            folder,
            PATH=f"{BIN}:{os.environ['PATH']}",
        )
        assert done.returncode == 0, f"{name}: {done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        found[name] = Run(folder / "runs" / name, ())
    return found


@pytest.mark.parametrize("name", LAUNCHERS)
def test_the_same_numbers_under_every_launcher(launched: dict[str, Run], by_torchrun: Run, name: str) -> None:
    reference, run = by_torchrun, launched[name]
    assert run.summary["world_size"] == reference.summary["world_size"] == 2
    for key in ("train/loss", "train/lr", "train/grad_norm", "eval/loss", "eval/accuracy", "progress/samples"):
        assert len(run.series(key)) == (2 if key.startswith("eval") else 10)
        assert run.series(key) == reference.series(key), key
    ours, theirs = run.weights(), reference.weights()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_run_keeps_the_output_of_each_rank(launched: dict[str, Run]) -> None:
    first, second = ((launched["run"].folder / "logs" / f"rank-{rank}.txt").read_text() for rank in (0, 1))
    assert "\nstrategy  zero2: asked for\n" in first
    assert "strategy  zero2" not in second, "ranks but the first are silent"


def test_what_a_launcher_brings_against_the_config_is_named(material: Material, tmp_path: Path) -> None:
    config = write_config(
        tmp_path / "c.yaml", material.text(shard={"strategy": "zero2"}), output=str(tmp_path / "runs")
    )
    words = [
        *ACCELERATE, "--num_processes", "1", "--main_process_port", "0", "--use_deepspeed", "--zero_stage", "3",
        "--mixed_precision", "bf16", "--gradient_accumulation_steps", "7",
        "-m", "dist_finetune", "train", str(config),
    ]  # fmt: skip
    done = finish(words, 200, tmp_path)
    assert done.returncode != 0
    for said in (
        "ACCELERATE_DEEPSPEED_ZERO_STAGE=3 (--zero_stage), but the run uses zero2: write shard.strategy: zero3",
        "ACCELERATE_MIXED_PRECISION=bf16 (--mixed_precision), but the run trains in fp32",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=7",
    ):
        assert said in done.stderr
    assert not (tmp_path / "runs").exists()


def test_the_local_rank_that_deepspeed_puts_first(material: Material, tmp_path: Path) -> None:
    small = material.text(train={"max_steps": 1, "warmup": 0})
    config = write_config(tmp_path / "c.yaml", small, output=str(tmp_path / "runs"))
    done = command("--local_rank=0", "train", config, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert Run(tmp_path / "runs" / "c", ()).summary["status"] == "finished"
