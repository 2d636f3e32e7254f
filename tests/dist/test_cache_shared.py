"""One cache for several jobs and nodes: filled once, taken over from a job that is gone, refused where it can't be."""

import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import REPOSITORY, Job, Ranks, Run, RunJobs, run_ranks, start_ranks, write_config
from material import Material

pytestmark = pytest.mark.dist

SLOW_JOB = """
import sys, time
from dist_finetune import load_spec, train, turns
from dist_finetune.cache import fill

turns.BEAT_S, turns.STALE_S, fill.LOOK_FOR_S = 0.2, 3.0, 0.5
prefix_of = fill.prefix_of
fill.prefix_of = lambda *given: time.sleep(0.1) or prefix_of(*given)
train(load_spec(sys.argv[1], sys.argv[2:]))
"""


@pytest.fixture
def start(material: Material, tmp_path: Path) -> Any:
    """Starts a job by its name, all on one cache folder, which takes some seconds to fill; ends what is left."""
    started: list[Ranks] = []

    def begin(name: str) -> Ranks:
        config = material.text(train={"eval_batch_size": 4})
        more = {"name": name, "output": str(tmp_path / "runs"), "shard": {"strategy": "ddp"}}
        cache = {"mode": "on", "folder": str(tmp_path / "cache")}
        path = write_config(tmp_path / f"{name}.yaml", config, cache=cache, **more)
        script, folder = tmp_path / "slow_job.py", tmp_path / name
        script.write_text(SLOW_JOB, encoding="utf-8")
        folder.mkdir()
        started.append(start_ranks(1, script, [path], folder))
        return started[-1]

    yield begin
    for job in started:
        job.signal(signal.SIGKILL)


def test_two_jobs_at_once_fill_one_entry(start: Callable[[str], Ranks], tmp_path: Path, plain: Run) -> None:
    """As the tasks of a sweep do: one pays for the prefix, the other waits for it, and both train as without."""
    for job in [start(name) for name in ("one", "other")]:
        assert_success(job)
    logs = sorted(logs_of(tmp_path).values(), key=lambda log: "cache reused" in log)
    assert ["cache built" in log for log in logs] == [True, False]
    assert "another job is filling this cache" in logs[1]
    assert [path.name[0] for path in (tmp_path / "cache").iterdir()] != ["."]
    losses_are(plain, tmp_path)


def test_a_job_that_is_killed_leaves_its_half_to_the_next(
    start: Callable[[str], Ranks], tmp_path: Path, plain: Run
) -> None:
    first = start("killed")
    wait_for(lambda: list(tmp_path.glob("cache/.*/train-00000.bin")), 100)
    second = start("next")
    time.sleep(1)
    first.signal(signal.SIGKILL)
    wait_for(lambda: not first.are_running, 30)
    assert_success(second)
    assert "cache built" in logs_of(tmp_path)["next"]
    (entry,) = (tmp_path / "cache").iterdir()
    assert not entry.name.startswith(".")
    losses_are(plain, tmp_path, "next")


def test_a_job_that_stood_still_trains_on_what_another_filled_meanwhile(
    start: Callable[[str], Ranks], tmp_path: Path, plain: Run
) -> None:
    first = start("still")
    wait_for(lambda: list(tmp_path.glob("cache/.*/train-00000.bin")), 100)
    time.sleep(1)
    first.signal(signal.SIGSTOP)
    second = start("awake")
    wait_for(lambda: list(tmp_path.glob("cache/.*.turn-1")), 100)
    first.signal(signal.SIGCONT)
    for job in (first, second):
        assert_success(job)
    logs = logs_of(tmp_path)
    assert "cache built" in logs["awake"]
    assert "another one fills the cache" in logs["still"]
    assert "cache reused" in logs["still"]
    losses_are(plain, tmp_path)


OWN_DISKS = """
import os, pathlib, sys
here = pathlib.Path(sys.argv[1]).parent / f"node{os.environ['RANK']}"
here.mkdir()
os.chdir(here)  # a relative folder is another one on each "node"
from dist_finetune import load_spec, train
from dist_finetune.cache import fill

fill.SEEN_WITHIN_S = 0.5
train(load_spec(sys.argv[1], sys.argv[2:]))
"""


def test_nodes_with_a_disk_of_their_own_each_are_told(material: Material, tmp_path: Path, plain: Run) -> None:
    more = {"name": "own", "output": str(tmp_path / "runs"), "cache": {"mode": "on", "folder": "mine"}}
    path = write_config(tmp_path / "own.yaml", material.text(shard={"strategy": "ddp"}), **more)
    script = tmp_path / "own.py"
    script.write_text(OWN_DISKS, encoding="utf-8")
    done = run_ranks(2, script, [path], 200, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    told = logs_of(tmp_path)["own"]
    assert "note: no cache: mine is not the same disk for all processes" in told
    assert "set cache.folder to a folder that all nodes share" in told
    assert [path.name for path in tmp_path.glob("node*/mine/.*x*")] == []
    losses_are(plain, tmp_path)


@pytest.fixture(scope="module")
def plain(material: Material, runs: RunJobs) -> Run:
    """The job of these tests without a cache."""
    config = material.text(train={"eval_batch_size": 4}, shard={"strategy": "ddp"}, cache="off")
    return runs([Job("plain", config)], 1)["plain"]


def test_what_can_t_be_cut_or_kept_is_told_and_leaves_nothing(
    material: Material, tmp_path: Path, runs: RunJobs
) -> None:
    """The model is tried before the cache is filled; bytes are compared with the quota before any entry is evicted."""
    kinds = {"one_width": r"its logits would differ by \d", "two_widths": "the rest can't run alone: "}
    jobs = [
        Job(
            kind,
            material.image(
                model={"name": f"uncut_model:of_{kind}", "weights": "none"}, train={"epochs": 2},
                cache={"mode": "on", "folder": str(tmp_path / "cache")},
            )
            | {"freeze": {"patterns": ["stem.*", "block.*"]}},
        )
        for kind in kinds
    ]  # fmt: skip
    small = {"mode": "on", "folder": str(tmp_path / "cache"), "quota": "1KiB"}
    jobs.append(Job("quota", material.text(cache=small, shard={"strategy": "ddp"})))
    done = runs(jobs, 1, PYTHONPATH=f"{REPOSITORY}:{Path(__file__).parent}")
    for kind, reason in kinds.items():
        assert re.search(f"note: no cache: cut after block, {reason}", log_of(done[kind]))
        assert done[kind].summary["status"] == "finished"
    assert re.search(r"note: no cache: \d MiB are more than cache.quota, which is 0 MiB", log_of(done["quota"]))
    assert [path.name for path in tmp_path.glob("cache/*") if ".turn-" not in path.name] == []


def losses_are(plain: Run, folder: Path, *names: str) -> None:
    for name in names or logs_of(folder):
        run = Run(folder / "runs" / name, ())
        assert run.series("train/loss") == pytest.approx(plain.series("train/loss"), rel=1e-6), name
        assert run.series("eval/accuracy") == plain.series("eval/accuracy")


def log_of(run: Run) -> str:
    return (run.folder / "log.txt").read_text(encoding="utf-8")


def logs_of(folder: Path) -> dict[str, str]:
    return {path.parent.name: path.read_text(encoding="utf-8") for path in folder.glob("runs/*/log.txt")}


def assert_success(job: Ranks) -> None:
    done = job.end(200)
    assert done.returncode == 0, done.stderr[-3000:]


def wait_for(condition: Callable[[], object], timeout_s: float) -> None:
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.05)
