"""What an existing run folder means: go on, say that it is finished, or refuse and name the difference."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import read_json, read_lines, write_config
from material import Material, write_material
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from dist_finetune import finish
from dist_finetune.checkpoint.layout import checkpoint_folders
from dist_finetune.cli import app
from dist_finetune.errors import UserError
from dist_finetune.evaluate import Evaluation, evaluate
from dist_finetune.hold import LostHold
from dist_finetune.run import train
from dist_finetune.run_folder import check_run_folder, write_text
from dist_finetune.spec_file import load_spec
from dist_finetune.summary import Summary

Train = Callable[..., Summary]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Material, Path, dict[str, Any]]:
    """A run of two epochs on one process, its material and its config: 4 steps an epoch, saved after each."""
    material = write_material(tmp_path_factory.mktemp("material"))
    changes: dict[str, Any] = {
        "train": {"global_batch_size": 32, "epochs": 2, "lr": 1e-3}, "checkpoint": {"every": "1 epoch", "keep": 3},
        "data": {"train": str(material.train), "validation": 0.2}, "shard": {"strategy": "ddp"}, "cache": "off",
    }  # fmt: skip
    config = material.text(**changes)
    output = tmp_path_factory.mktemp("runs")
    path = write_config(output / "job.yaml", config, name="job", output=str(output))
    assert train(load_spec(str(path))).status == "finished"
    return material, output / "job", config


@pytest.fixture
def again(finished: tuple[Material, Path, dict[str, Any]], tmp_path: Path) -> tuple[Path, Train]:
    """A copy of the run, cut off right after its last save, and a function that starts it anew."""
    material, run, config = finished
    copy = tmp_path / "job"
    shutil.copytree(run, copy)
    (copy / "summary.json").unlink()
    inside = json.loads(json.dumps(config).replace(str(material.folder), str(tmp_path / "material")))
    shutil.copytree(material.folder, tmp_path / "material")
    recorded = (copy / "config.yaml").read_text(encoding="utf-8")
    recorded = recorded.replace(str(material.folder), str(tmp_path / "material")).replace(
        str(run.parent), str(tmp_path)
    )
    (copy / "config.yaml").write_text(recorded, encoding="utf-8")

    def start(changes: str = "none", *, overrides: list[str] | None = None, fresh: bool = False) -> Summary:
        path = write_config(tmp_path / "job.yaml", inside, name="job", output=str(tmp_path))
        return train(load_spec(str(path), overrides or ()), fresh=fresh, changes=changes)  # type: ignore[arg-type]

    return copy, start


def refused(start: Train, *args: Any, **options: Any) -> str:
    with pytest.raises(UserError) as error:
        start(*args, **options)
    return str(error.value)


def test_a_run_that_ended_before_its_summary_is_ended_again(again: tuple[Path, Train], finished: Any) -> None:
    run, start = again
    summary = start()
    assert (summary.status, summary.attempts, summary.steps) == ("finished", 2, 8)
    assert summary.metrics == read_json(finished[1] / "summary.json")["metrics"]
    a, b = (load_file(folder / "model" / "model.safetensors") for folder in (run, finished[1]))
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_a_run_that_died_before_its_first_checkpoint_is_the_same_run(again: tuple[Path, Train]) -> None:
    run, start = again
    shutil.rmtree(run / "checkpoints")
    (run / "wandb.json").write_text('{"id": "abc"}')
    assert start().attempts == 2
    assert [(line["attempt"], line["step"]) for line in read_lines(run / "attempts.jsonl")] == [(1, 0), (2, 0)]
    assert read_json(run / "wandb.json") == {"id": "abc"}
    steps = [row["step"] for row in read_lines(run / "metrics.jsonl") if "train/loss" in row]
    assert steps == list(range(1, 9))


def test_a_finished_run_says_so_and_is_not_touched(
    again: tuple[Path, Train], capsys: pytest.CaptureFixture[str]
) -> None:
    run, start = again
    first = start()
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    capsys.readouterr()
    assert start() == first
    assert f"{run} is finished; `run` with --fresh trains it again" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_more_epochs_and_another_rate_need_a_word(again: tuple[Path, Train]) -> None:
    run, start = again
    longer = {"overrides": ["train.epochs=3", "train.lr=5e-4"]}
    assert "train.epochs: 2.0 before, 3.0 now" in refused(start, **longer)
    refused(start, overrides=["data.max_rows=-1", "train.micro_batch_size=7"], fresh=True)
    assert not (run / "summary.json").exists(), "the run there has not failed"
    assert "--allow ...` takes other epochs" in refused(start, "layout", **longer)
    summary = start("allow", **longer)
    assert (summary.steps, summary.attempts) == (12, 2)
    steps = [row["step"] for row in read_lines(run / "metrics.jsonl") if "train/loss" in row]
    assert steps == sorted(steps)
    assert steps[-1] == 12
    assert "train.seed" in refused(start, "allow", overrides=["train.seed=3"])


def test_a_run_goes_on_with_less_memory_and_another_disk(again: tuple[Path, Train], finished: Any) -> None:
    """Recomputed activations change no number, and a cache holds the same wherever it lies."""
    run, start = again
    shutil.rmtree(run / "checkpoints" / "step-000008")
    disk = json.dumps({"mode": "off", "folder": str(run.parent / "disk")})
    less = {"overrides": ["train.gradient_checkpointing=true", f"cache={disk}"]}
    assert "train.gradient_checkpointing: False before, True now" in refused(start, **less)
    assert start("layout", **less).steps == 8
    a, b = (load_file(folder / "model" / "model.safetensors") for folder in (run, finished[1]))
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_a_run_goes_on_from_stored_activations_or_without(again: tuple[Path, Train], finished: Any) -> None:
    run, start = again
    for mode, became in (("on", "built"), ("off", "none: off in the config")):
        shutil.rmtree(run / "checkpoints" / "step-000008")
        (run / "summary.json").unlink(missing_ok=True)
        summary = start("layout", overrides=[f"cache={mode}"])
        assert summary.steps == 8
        assert summary.phases[0]["cache"].startswith(became)
    a, b = (load_file(folder / "model" / "model.safetensors") for folder in (run, finished[1]))
    assert all(torch.allclose(a[name], b[name], atol=1e-5) for name in b)


def test_a_run_that_another_job_has_taken_over_exports_nothing(
    again: tuple[Path, Train], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where that is found out after the last checkpoint."""
    run, start = again
    shutil.rmtree(run / "model")

    def take_over(*arguments: Any) -> Evaluation:
        (run / ".writer.turn-1").write_text(json.dumps({"host": "node9 boot pid", "pid": 7, "started": "1"}))
        return evaluate(*arguments)

    monkeypatch.setattr(finish, "evaluate", take_over)
    with pytest.raises(LostHold, match="another job, process 7 on node9, has gone on with the run"):
        start()
    assert not (run / "model").exists()
    assert not (run / "summary.json").exists()
    assert (run / ".writer.turn-1").exists()


def test_other_rows_are_refused(again: tuple[Path, Train]) -> None:
    run, start = again
    rows = run.parent / "material" / "train.csv"
    rows.write_text(rows.read_text(encoding="utf-8").replace("rain", "sun", 1), encoding="utf-8")
    message = refused(start)
    assert "data: " in message
    assert "the rows or their order differ" in message
    assert "--fresh" in message


def test_other_base_weights_are_refused(again: tuple[Path, Train]) -> None:
    run, start = again
    weights = run.parent / "material" / "bert" / "model.safetensors"
    state = load_file(weights)
    state[next(iter(state))] += 1e-3
    save_file(state, weights, metadata={"format": "pt"})
    message = refused(start)
    assert "base model: " in message
    assert "frozen weights are not in a checkpoint" in message


def test_another_freeze_is_refused_by_the_names_of_its_tensors(again: tuple[Path, Train]) -> None:
    """The same words in the config, but another meaning: as after an update that numbers blocks otherwise."""
    run, start = again
    config = run / "config.yaml"
    recorded = config.read_text(encoding="utf-8")
    assert "layers: '0'" in recorded or 'layers: "0"' in recorded
    config.write_text(recorded.replace("layers: '0'", "layers: '1'").replace('layers: "0"', 'layers: "1"'))
    message = refused(start, overrides=["freeze.layers=1"])
    assert "freeze: " in message
    assert "frozen before and not now: bert.encoder.layer.0.attention." in message
    assert "frozen now and not before: bert.encoder.layer.1.attention." in message
    assert "and 11 more" in message


def test_other_classes_are_refused(again: tuple[Path, Train]) -> None:
    run, start = again
    rows = run.parent / "material" / "train.csv"
    rows.write_text(rows.read_text(encoding="utf-8").replace(",music", ",noise"), encoding="utf-8")
    assert "classes: [food, music, weather] in the checkpoint, [food, noise, weather] now" in refused(start)


def test_the_checkpoint_before_a_damaged_one_is_used(
    again: tuple[Path, Train], finished: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run, start = again
    newest, before = checkpoint_folders(run)[:2]
    (newest / "rank-00000.safetensors").unlink()
    summary = start()
    out = capsys.readouterr().out
    assert f"WARNING {newest.name} is damaged (rank-00000.safetensors is missing)" in out
    assert f"going on from {before.name} of 8 steps, attempt 2" in out
    assert summary.metrics == read_json(finished[1] / "summary.json")["metrics"]


def test_without_any_good_checkpoint_nothing_is_thrown_away(again: tuple[Path, Train]) -> None:
    run, start = again
    for folder in checkpoint_folders(run):
        (folder / "state.json").write_text("{}")
    metrics = (run / "metrics.jsonl").read_bytes()
    message = refused(start)
    assert "none of its checkpoints is whole" in message
    assert f"dist-finetune verify {run}" in message
    assert (run / "metrics.jsonl").read_bytes() == metrics
    assert start(fresh=True).attempts == 1
    assert len([path for path in run.parent.iterdir() if path.name.startswith("job.2")]) == 1, (
        "the old one is kept aside"
    )


def test_the_best_checkpoint_outlives_a_resume(
    finished: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a rate that ruins the model the first epoch stays the best: rotation must not take it after a restart. Where
    it could not be saved, the run still ends well."""
    _, _, config = finished
    train_ = {**config["train"], "lr": 1.0, "epochs": 4, "warmup": 0, "schedule": "constant"}
    changed = {**config, "train": train_, "checkpoint": {"every": "1 epoch", "keep": 1, "best": "eval/loss"}}
    path = write_config(tmp_path / "job.yaml", changed, name="job", output=str(tmp_path))
    whole = train(load_spec(str(path)))
    assert whole.kept_step < whole.steps
    run = tmp_path / "job"
    (run / "summary.json").unlink()
    shutil.rmtree(run / "checkpoints" / f"step-{whole.steps:06d}")
    assert [f.name for f in checkpoint_folders(run)] == [f"step-{whole.kept_step:06d}"]
    resumed = train(load_spec(str(path)))
    assert (resumed.kept_step, resumed.metrics) == (whole.kept_step, whole.metrics)
    (run / "summary.json").unlink()
    shutil.rmtree(run / "checkpoints" / f"step-{whole.kept_step:06d}")
    assert train(load_spec(str(path))).kept_step == whole.steps
    told = capsys.readouterr().out
    assert f"WARNING the best model, of step {whole.kept_step}, was not saved; kept is the last one" in told


def test_a_run_whose_patience_was_over_is_not_trained_on(finished: Any, tmp_path: Path) -> None:
    _, _, config = finished
    train_ = {**config["train"], "lr": 1e-12, "epochs": 6, "early_stop": 1}
    path = write_config(tmp_path / "job.yaml", {**config, "train": train_}, name="job", output=str(tmp_path))
    whole = train(load_spec(str(path)))
    assert whole.stopped_early
    (tmp_path / "job" / "summary.json").unlink()
    resumed = train(load_spec(str(path)))
    assert (resumed.steps, resumed.attempts, resumed.stopped_early) == (whole.steps, 2, True)
    assert resumed.metrics == whole.metrics


def test_a_last_step_that_spoils_the_weights_is_told(
    finished: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No training loss comes after it."""
    _, _, config = finished
    train_ = {"lr": 1e30, "global_batch_size": 1000, "epochs": 1, "warmup": 0}
    path = write_config(tmp_path / "job.yaml", {**config, "train": train_}, name="job", output=str(tmp_path))
    done = train(load_spec(str(path)))
    assert done.steps == 1
    assert "WARNING validation loss of the model that is kept is nan" in capsys.readouterr().out


def test_patience_ends_a_phase_and_the_next_one_has_its_own(finished: Any, tmp_path: Path) -> None:
    _, _, config = finished
    phases = [
        {"name": name, "freeze": freeze, "epochs": 4, "lr": 1e-12}
        for name, freeze in (("a", "backbone"), ("b", "none"))
    ]
    changes = {"freeze": None, "phases": phases, "train": {"global_batch_size": 32, "early_stop": 1}}
    path = write_config(tmp_path / "job.yaml", {**config, **changes}, name="job", output=str(tmp_path))
    done = train(load_spec(str(path)))
    steps = [phase["last_step"] for phase in done.phases]
    assert len(steps) == 2
    assert steps[0] < 16
    assert steps[1] < steps[0] + 16
    log = (tmp_path / "job" / "log.txt").read_text(encoding="utf-8")
    assert "phase a ends early, b comes next: 1 evaluations without a better score" in log
    assert log.count("stopping early: 1 evaluations") == 1


def test_statistics_that_an_earlier_phase_moved_outlive_the_cache(finished: Any, tmp_path: Path) -> None:
    """The second phase caches the BatchNorm that trained in the first: no rank holds it, and no source has it."""
    material = finished[0]
    phases = [{"name": "all", "freeze": "none", "epochs": 1}, {"name": "head", "freeze": "backbone", "epochs": 2}]
    config = {**material.image(freeze=None, phases=phases, shard={"strategy": "ddp"}), "cache": "auto"}
    config["train"].pop("epochs")
    path = write_config(tmp_path / "job.yaml", config, name="job", output=str(tmp_path))
    run = tmp_path / "job"
    assert train(load_spec(str(path))).cache_s > 0
    assert "cache built in" in (run / "log.txt").read_text(encoding="utf-8")
    exported = load_file(run / "model" / "model.safetensors")
    assert exported["conv1.1.num_batches_tracked"].item() > 1234, "those of the base model"
    (run / "summary.json").unlink()
    train(load_spec(str(path)))
    again = load_file(run / "model" / "model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in exported.items())


def test_a_full_checkpoint_of_a_cached_run_holds_the_models_state_and_no_more(finished: Any, tmp_path: Path) -> None:
    _, _, config = finished
    train_ = {**config["train"], "epochs": 2}
    changed = {**config, "cache": "on", "train": train_, "checkpoint": {"full": True}}
    path = write_config(tmp_path / "job.yaml", changed, name="job", output=str(tmp_path))
    assert train(load_spec(str(path))).status == "finished"
    expected = load_file(finished[1] / "model" / "model.safetensors")
    assert set(load_file(tmp_path / "job" / "model" / "model.safetensors")) == set(expected)


@pytest.mark.parametrize("fresh", [False, True])
def test_a_folder_that_is_no_run_is_left_alone(tmp_path: Path, fresh: bool) -> None:
    parts = {"model": {"name": "demo:minilm"}, "data": {"train": "x.csv"}}
    spec = load_spec({**parts, "name": "job", "output": str(tmp_path)})
    run = tmp_path / "job"
    run.write_text("a file")
    with pytest.raises(UserError, match="job: Not a directory; choose another output"):
        check_run_folder(spec, fresh, "none")
    run.unlink()
    run.mkdir()
    (run / ".config.yaml.17").write_text("what a start left that was killed")
    assert check_run_folder(spec, fresh, "none") == "new"
    (run / "metrics.jsonl").write_text("of another tool")
    with pytest.raises(UserError, match="job exists and is no run of this tool; choose another name"):
        check_run_folder(spec, fresh, "none")


def test_verify_on_the_command_line(again: tuple[Path, Train]) -> None:
    run, _ = again
    newest = checkpoint_folders(run)[0]
    good = CliRunner().invoke(app, ["verify", str(run)])
    assert good.exit_code == 0
    assert good.output.splitlines()[-1] == f"resuming would go on from {newest.name}"
    with (newest / "rank-00000.safetensors").open("ab") as file:
        file.write(b"\\0")
    assert CliRunner().invoke(app, ["verify", str(newest)]).exit_code == 1
    assert "resuming would go on from step-000004" in CliRunner().invoke(app, ["verify", str(run)]).output


def test_a_folder_that_was_moved_and_renamed_goes_on(again: tuple[Path, Train]) -> None:
    run, _ = again
    moved = run.parent / "elsewhere" / "renamed"
    moved.parent.mkdir()
    run.rename(moved)
    spec = load_spec(str(moved / "config.yaml"), [f"output={json.dumps(str(moved.parent))}", "name=renamed"])
    assert train(spec, changes="layout").attempts == 2


def test_a_file_that_can_not_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "plan.json").mkdir()  # so that the rename fails
    with pytest.raises(IsADirectoryError):
        write_text(tmp_path / "plan.json", "{}")
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
