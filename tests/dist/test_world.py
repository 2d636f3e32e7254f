"""Ranks that disagree are refused, all with the same words and in seconds; an existing group is left as it is."""

import sys
import time
from pathlib import Path

import pytest
from harness import Job, Run, RunJobs, finish, run_ranks, write_config
from material import Material

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def disagreements(material: Material, runs: RunJobs) -> dict[str, Run]:
    """Runs of 2 processes, of which rank 1 has another config; the last one is sound, to show that the group lives."""
    small = {"max_steps": 2, "warmup": 0}
    other_rank = {
        "lr": ["train.lr=1e-4"],
        "freeze": ["freeze.layers=1"],
        "rows": ["data.max_rows=100"],
        "strategy": ["shard.strategy=zero2"],
        "file": [f"data.train={material.folder / 'not-here.csv'}"],
        "column": ["data.text=sentence"],
        "model": [f"model.name={material.folder / 'no-model'}"],
        "sound": [],
    }
    jobs = [Job(name, material.text(train=small), {"1": overrides}) for name, overrides in other_rank.items()]
    return runs(jobs, 2, may_fail=True)


@pytest.mark.parametrize("name", ["lr", "freeze", "rows", "strategy"])
def test_another_plan_on_one_rank(disagreements: dict[str, Run], name: str) -> None:
    run = disagreements[name]
    for rank in run.by_rank:
        assert rank["error"] == "UserError", rank
        assert "the plan differs between ranks: rank 0 has" in rank["message"]
        assert "rank 1 has" in rank["message"]
        assert rank["exit_code"] == 2
    assert not run.folder.exists()


@pytest.mark.parametrize(
    ("name", "words"), [("file", "not-here.csv"), ("column", "sentence"), ("model", "no-model")]
)  # fmt: skip
def test_input_that_is_wrong_on_one_rank_ends_all(disagreements: dict[str, Run], name: str, words: str) -> None:
    run = disagreements[name]
    first, second = run.by_rank
    assert first == second
    assert words in first["message"]
    assert first["exit_code"] == 2
    assert not run.folder.exists()


def test_the_group_serves_on_after_refusals(disagreements: dict[str, Run]) -> None:
    sound = disagreements["sound"]
    assert sound.summary["status"] == "finished"
    assert sound.by_rank[0] == sound.by_rank[1] | {"summary": sound.by_rank[0]["summary"]}
    assert sound.by_rank[1]["summary"]["metrics"] == sound.summary["metrics"]


ACCELERATOR = """
import dataclasses, sys
from dist_finetune.engine import open_accelerator
from dist_finetune.errors import UserError
from dist_finetune.plan import make_plan
from dist_finetune.topology import local_topology
from dist_finetune.spec_file import load_spec
from dist_finetune.world import join_world

spec = load_spec(sys.argv[1], [f"shard.strategy={sys.argv[2]}"])
with join_world(spec.launch) as world:
    plan = make_plan(spec, local_topology(2))
    alone = dataclasses.replace(world, world_size=1)
    try:
        open_accelerator(plan, plan.phases[0], alone)
    except UserError as error:
        open(f"{sys.argv[3]}.{world.rank}", "w").write(str(error))
    open_accelerator(plan, plan.phases[0], world)
"""


@pytest.mark.parametrize(("strategy", "who"), [("ddp", "Accelerate"), ("zero2", "Accelerate")])
def test_accelerate_must_see_the_same_world(material: Material, tmp_path, strategy: str, who: str) -> None:
    """Two processes that take themselves for worlds of one would train apart (accelerate#1795)."""
    (tmp_path / "code.py").write_text(ACCELERATOR)
    config = write_config(tmp_path / "c.yaml", material.text(), output=str(tmp_path / "runs"))
    done = run_ranks(2, tmp_path / "code.py", [config, strategy, tmp_path / "said"], 200, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in (0, 1):
        said = (tmp_path / f"said.{rank}").read_text()
        assert f"{who} sees 2 processes, torch.distributed 1" in said


UNLIKE_CPUS = """
import sys
import torch
from dist_finetune.report import Reporter
from dist_finetune.run import _prepare
from dist_finetune.signals import StopSignals
from dist_finetune.spec_file import load_spec
from dist_finetune.world import join_world

spec = load_spec(sys.argv[1])
with StopSignals() as signals, join_world(spec.launch) as world:
    torch.cpu._is_amx_tile_supported = lambda: world.is_first
    plan = _prepare(spec, world, Reporter(False), signals).plan
    open(f"{sys.argv[2]}.{world.rank}", "w").write(f"{plan.topology.has_amx} {plan.digest()}")
"""


def test_machines_of_different_kinds_run_one_job(material: Material, tmp_path) -> None:
    (tmp_path / "code.py").write_text(UNLIKE_CPUS)
    config = write_config(tmp_path / "c.yaml", material.text(), output=str(tmp_path / "runs"))
    done = run_ranks(2, tmp_path / "code.py", [config, tmp_path / "said"], 200, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = ((tmp_path / f"said.{rank}").read_text() for rank in (0, 1))
    assert first == second
    assert first.startswith("False")


SLOW_FILES = """
import sys, time
from pathlib import Path
import torch
from dist_finetune.spec import LaunchSpec
from dist_finetune.watchdog import Watchdog
from dist_finetune.world import join_world, on_first, sum_over_ranks, together

launch = LaunchSpec(timeout=3.0, file_timeout=60.0)
with join_world(launch) as world:
    with Watchdog(world, Path(sys.argv[1]), launch, lambda: 0, lambda error: None):
        on_first(world, lambda: time.sleep(5))
        together(lambda: time.sleep(5 * world.rank))
    if world.rank == 1:
        time.sleep(8)
    try:
        sum_over_ranks(torch.ones(1))
    except RuntimeError as error:
        Path(f"{sys.argv[1]}.{world.rank}").write_text(str(error))
"""


def test_slow_files_are_no_hang_and_a_slow_step_is(tmp_path) -> None:
    (tmp_path / "code.py").write_text(SLOW_FILES)
    run_ranks(2, tmp_path / "code.py", [tmp_path / "said"], 100, tmp_path)
    assert "imed out" in (tmp_path / "said.0").read_text()


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "LOCAL_RANK"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}, "RANK"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}, "MASTER_ADDR"),
    ],
)
def test_variables_that_do_not_add_up(material: Material, tmp_path, variables: dict[str, str], words: str) -> None:
    config = write_config(tmp_path / "c.yaml", material.text(), output=str(tmp_path / "runs"))
    started = time.monotonic()
    done = finish([sys.executable, "-m", "dist_finetune", "train", str(config)], 100, tmp_path, **variables)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - started < 60
    assert not (tmp_path / "runs").exists()


FIRST_OF_TWO = """
import os, sys
from dist_finetune.cli import main

os.environ["WORLD_SIZE"] = "2"
main(["train", sys.argv[1], "launch.join_timeout=4s"])
"""


def test_a_rank_that_nobody_starts_is_named_by_train(material: Material, tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text(FIRST_OF_TWO)
    config = write_config(tmp_path / "c.yaml", material.text(), output=str(tmp_path / "runs"))
    done = run_ranks(1, tmp_path / "code.py", [config], 60, tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    said = "error: rank 1 of 2 did not arrive within 4 s (node 1, counted from 0). Look at the output there"
    assert said in done.stderr
    assert not (tmp_path / "runs").exists()
