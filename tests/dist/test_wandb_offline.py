"""One W&B run, made by one process with the real client; its file, read back, holds the metrics of metrics.jsonl."""

import json
from typing import Any

import pytest
from harness import Job, Run, RunJobs, read_lines
from material import Material
from wandb_file import records

pytestmark = pytest.mark.dist

TRAIN_KEYS = {
    "train/loss", "train/lr", "train/grad_norm", "perf/samples_per_s", "perf/step_s", "perf/data_wait_s",
    "mem/peak_gib", "params/trainable", "progress/epoch", "progress/samples",
}  # fmt: skip


@pytest.fixture(scope="module")
def tracked(material: Material, runs: RunJobs, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of 2 processes, one of a sweep, by a user who is not logged in and said nothing about W&B."""
    config = material.text(train={"epochs": 1}, track={"wandb": "auto", "project": "tiny"})
    home = str(tmp_path_factory.mktemp("home"))
    return runs([Job("tracked", config)], 2, HOME=home, WANDB_RUN_GROUP="sweep")["tracked"]


def test_one_offline_run_by_one_process(tracked: Run) -> None:
    assert tracked.summary["wandb"] == "offline"
    assert len(list(tracked.folder.rglob("*.wandb"))) == 1
    assert len(list((tracked.folder / "wandb").glob("offline-run-*"))) == 1
    started = [record.run for record in records(*tracked.folder.rglob("*.wandb")) if record.HasField("run")]
    assert {(run.display_name, run.project, run.run_group) for run in started} == {("tracked", "tiny", "sweep")}


def test_history_is_that_of_metrics_jsonl(tracked: Run) -> None:
    history: dict[int, dict[str, Any]] = {}
    for record in records(*tracked.folder.rglob("*.wandb")):
        if record.HasField("history"):
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            history.setdefault(row["step"], {}).update(row)
    expected: dict[int, dict[str, Any]] = {}
    for line in read_lines(tracked.folder / "metrics.jsonl"):
        expected.setdefault(line["step"], {}).update(line)
    assert sorted(history) == sorted(expected) == list(range(11))
    for step, row in expected.items():
        for key, value in row.items():
            if key not in ("time", "step"):
                assert history[step][key] == pytest.approx(value, rel=1e-6), (step, key)
    assert set(history[1]) >= TRAIN_KEYS
    assert {"eval/accuracy", "eval/loss", "eval/f1"} <= set(history[0]) & set(history[10])


def test_its_state_and_summary_are_those_of_the_run(tracked: Run) -> None:
    found = list(records(*tracked.folder.rglob("*.wandb")))
    (end,) = [record.exit for record in found if record.HasField("exit")]
    assert end.exit_code == 0
    updates = {item.key: item.value_json for r in found if r.HasField("summary") for item in r.summary.update}
    assert json.loads(updates["status"]) == "finished"
    assert json.loads(updates["num_frozen_tensors_verified"]) == tracked.summary["num_frozen_tensors_verified"]
