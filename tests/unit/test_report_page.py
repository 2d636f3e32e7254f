"""report.html: the numbers of the run's files, nothing from elsewhere, inert whatever names a user chose."""

import csv
import json
import math
import re
import shutil
import time
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from harness import read_json, read_lines, write_config
from material import write_material
from rich.console import Group
from safetensors.torch import load_file, save_file

from dist_finetune.cli import main
from dist_finetune.errors import UserError
from dist_finetune.html_report.at_end import write_page
from dist_finetune.html_report.facts import duration
from dist_finetune.html_report.figures import Line, curves, frozen_parts, running_mean
from dist_finetune.html_report.metrics import read_metrics
from dist_finetune.html_report.page import write_comparison, write_report
from dist_finetune.html_report.predictions import read_confusion
from dist_finetune.report import Reporter
from dist_finetune.run import train
from dist_finetune.spec_file import load_spec
from dist_finetune.summary import load_summary
from dist_finetune.world import World

HOSTILE = ("<script>alert(1)</script>", "$x_{1$ \"&'", "</style><img src=x onerror=alert(1)>")
PLAIN = ("weather", "food", "music")
VOID = {"meta", "br", "img", "hr", "input", "link"}


class Page(HTMLParser):
    """What a browser would see: every tag with its attributes, every text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self.rows and {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data.strip()

    def values(self, key: str, name: str) -> list[float]:
        """data-value of the elements whose attribute `key` is `name`."""
        return [float(tag["data-value"] or "nan") for _, tag in self.tags if tag.get(key) == name]

    def row(self, first: str) -> list[str]:
        """The cells of the one table row that starts so."""
        found = [row for row in self.rows if row and row[0] == first]
        assert len(found) == 1, (first, found)
        return found[0]

    def all_values(self) -> set[str]:
        return {str(tag["data-value"]) for _, tag in self.tags if "data-value" in tag}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run of two epochs on one process, whose classes have names that could break a page or a plot."""
    place = tmp_path_factory.mktemp("report")
    material = write_material(tmp_path_factory.mktemp("material"))
    names = dict(zip(PLAIN, HOSTILE, strict=True))
    for path in (material.train, material.validation):
        with path.open(newline="", encoding="utf-8") as file:
            rows = [[text, names.get(label, label)] for text, label in csv.reader(file)]
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)
    changes: dict[str, Any] = {
        "train": {"global_batch_size": 32, "micro_batch_size": 32, "epochs": 2, "lr": 1e-3},
        "checkpoint": {"every": "1 epoch", "keep": 3}, "shard": {"strategy": "ddp"}, "cache": "off",
        "phases": [{"name": "<b>head</b>", "freeze": "backbone", "epochs": 1, "lr": 1e-2},
                   {"name": "$x_{1$ top", "freeze": {"embeddings": True, "layers": "0"}, "epochs": 1, "lr": 1e-4}],
    }  # fmt: skip
    config = {key: value for key, value in material.text(**changes).items() if key != "freeze"}
    path = write_config(place / "job.yaml", config, name="job", output=str(place / "runs"))
    assert train(load_spec(str(path))).status == "finished"
    return place / "runs" / "job"


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    shutil.copytree(run, tmp_path / "job")
    return tmp_path / "job"


def test_a_finished_run_has_its_page_with_the_numbers_of_its_files(run: Path) -> None:
    page, summary = Page(run / "report.html"), read_json(run / "summary.json")
    plan, rows = read_json(run / "plan.json"), read_lines(run / "metrics.jsonl")
    shown = page.all_values()
    assert str(summary["metrics"]["eval/accuracy"]) in shown
    assert str(summary["num_frozen_tensors_verified"]) in shown
    assert str(summary["train_s"]) in shown
    for key in ("train/loss", "train/lr", "train/grad_norm", "eval/loss", "eval/accuracy", "eval/f1"):
        logged = [row[key] for row in rows if key in row]
        assert page.values("data-first", key) == [logged[0]], key
        assert page.values("data-last", key) == [logged[-1]], key
    samples = rows[-2]["progress/samples"]
    assert samples == 2 * plan["data"]["num_rows"]["train"]
    assert str(samples / summary["train_s"]) in shown
    for number, phase in enumerate(plan["phases"]):
        cells = page.row(f"trainable parameters, {phase['name']}")
        count = phase["manifest"]["num_trainable"]
        assert cells[1:] == [f"{count:,}", f"{count:,}", "equal"], number
    planned, actual = summary["memory"]["planned"]["optimizer"], summary["memory"]["actual"]["optimizer"]
    assert page.row("optimizer, MiB a rank")[1:3] == [f"{planned / 2**20:,.2f}", f"{actual / 2**20:,.2f}"]
    assert page.row("optimizer steps")[1:] == ["10", "10", "equal"]
    assert "finished" in page.texts
    assert "reads the first token alone" in page.texts


def test_frozen_counts_are_those_of_freeze_json(run: Path) -> None:
    freeze = read_json(run / "freeze.json")
    page = Page(run / "report.html")
    for name, phase in freeze["phases"].items():
        counts = {True: 0, False: 0}
        for tensor in phase["tensors"]:
            if tensor["kind"] == "parameter":
                counts[tensor["frozen"]] += tensor["num_elements"]
        assert page.row(name)[1].startswith(f"{counts[True]:,} frozen"), name
        assert f"{counts[False]:,} trainable" in page.row(name)[1]


def test_confusions_are_those_of_the_stored_predictions(run: Path) -> None:
    stored = load_file(run / "predictions" / "validation.safetensors")
    page = Page(run / "report.html")
    assert page.values("data-rows", "validation") == [len(stored["labels"])]
    right = (stored["logits"].argmax(1) == stored["labels"]).double().mean().item()
    assert page.values("data-accuracy", "validation") == pytest.approx([right])
    classes = read_json(run / "plan.json")["data"]["classes"]
    assert sorted(classes) == sorted(HOSTILE)
    for number, name in enumerate(classes):
        cells = next(row for row in page.rows if row and row[0] == name and len(row) == 5)
        mine = stored["labels"] == number
        assert cells[1:3] == [str(int(mine.sum())), str(int((stored["logits"][mine].argmax(1) == number).sum()))]
        counts = torch.bincount(stored["logits"][mine].argmax(1), minlength=len(classes)).tolist()
        heat = next(row for row in page.rows if row and row[0] == name and len(row) == 1 + len(classes))
        assert [int(cell or 0) for cell in heat[1:]] == counts


def test_plots_are_inside_and_whole(run: Path) -> None:
    text = (run / "report.html").read_text(encoding="utf-8")
    plots = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(plots) == 5
    ids = [value for plot in plots for value in re.findall(r'\bid="([^"]+)"', plot)]
    assert len(ids) == len(set(ids)), "an id of one plot would style or clip another"
    for plot in plots:
        ElementTree.fromstring(plot)
        for name in re.findall(r"url\(#([^)]+)\)|xlink:href=\"#([^\"]+)\"", plot):
            assert "".join(name) in ids
        assert not re.search(r"#[0-9a-f]{6}", plot), "a colour that the style sheet can't change"
    variables = set(re.findall(r"var\(--([\w-]+)\)", text))
    light, dark = text.split("prefers-color-scheme: dark")
    for name in variables:
        assert f"--{name}:" in light, name
        assert f"--{name}:" in dark, name


@pytest.mark.parametrize("kind", ["run", "comparison"])
def test_nothing_comes_from_elsewhere_and_names_are_inert(run: Path, tmp_path: Path, kind: str) -> None:
    path = run / "report.html"
    if kind == "comparison":
        other = tmp_path / "<script>alert(2)<"
        shutil.copytree(run, other)
        path = write_comparison([run, other], tmp_path / "both.html")
    page = Page(path)
    assert {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "img", "base"} == set()
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href", "action", "data", "srcset"):
                assert value is not None
                assert value.startswith("#"), (tag, name, value)
    styles = "".join(re.findall(r"<style>(.*?)</style>", path.read_text(encoding="utf-8"), re.DOTALL))
    assert "@import" not in styles
    assert "url(" not in styles
    if kind == "run":
        assert any(HOSTILE[0] in text for text in page.texts), "the name itself is to be read"
        assert any("<b>head</b>" in text for text in page.texts)


def test_a_resumed_run_shows_where_it_went_on(copy: Path, run: Path) -> None:
    kept = sorted((copy / "checkpoints").iterdir())
    assert [path.name for path in kept] == ["step-000005", "step-000010"]
    shutil.rmtree(kept[-1])
    for name in ("summary.json", "report.html"):
        (copy / name).unlink()
    config = (copy / "config.yaml").read_text(encoding="utf-8").replace(str(run.parent), str(copy.parent))
    (copy / "config.yaml").write_text(config, encoding="utf-8")
    assert train(load_spec(str(copy / "config.yaml"))).attempts == 2
    first, second = read_lines(copy / "attempts.jsonl")
    assert (first["attempt"], first["step"], second["attempt"], second["step"]) == (1, 0, 2, 5)
    page = Page(copy / "report.html")
    assert page.row("1")[1] == "0"
    assert page.row("2")[1] == "5"
    assert page.row("2")[3] == f"ddp x 1 from {second['host']}"
    last = max(row["time"] for row in read_lines(copy / "metrics.jsonl") if row["time"] < second["time"])
    assert page.row("2")[4] == duration(second["time"] - last)
    plots = re.findall(r"<svg.*?</svg>", (copy / "report.html").read_text(encoding="utf-8"), re.DOTALL)
    assert sum("run resumed" in plot for plot in plots) == 4
    assert not any("run resumed" in plot for plot in re.findall(r"<svg.*?</svg>", (run / "report.html").read_text()))


@pytest.mark.parametrize("status", ["failed", None])
def test_a_run_that_did_not_finish_has_a_page_too(copy: Path, status: str | None, capsys: Any) -> None:
    for name in ("summary.json", "report.html"):
        (copy / name).unlink()
    shutil.rmtree(copy / "predictions")
    message = "TrainingError: step 7: train/loss is <nan>"
    if status:
        (copy / "summary.json").write_text(json.dumps({"status": status, "message": message}))
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "train/lo')  # of a killed process
    with (copy / "attempts.jsonl").open("a") as file:
        file.write('{"attempt": 2, "st')  # of a full disk
    with pytest.raises(SystemExit) as end:
        main(["report", str(copy)])
    assert end.value.code in (0, None)
    assert capsys.readouterr().out == f"written: {copy / 'report.html'}\n"
    page = Page(copy / "report.html")
    assert (status or "unfinished") in page.texts
    assert (message in page.texts) == bool(status)
    assert page.row("optimizer steps")[1:] == ["10", "10", "equal"]
    assert not page.values("data-rows", "validation")


def test_a_run_without_any_step_has_a_page(copy: Path) -> None:
    for name in ("summary.json", "metrics.jsonl", "freeze.json", "environment.json"):
        (copy / name).unlink()
    shutil.rmtree(copy / "predictions")
    page = Page(write_report(copy))
    assert "No metrics were logged yet." in page.texts
    assert page.row("optimizer steps")[1:] == ["10", "0", "-100.0%"]


def test_several_runs_become_one_page(run: Path, copy: Path, tmp_path: Path, capsys: Any) -> None:
    summary = read_json(copy / "summary.json")
    summary["metrics"]["eval/accuracy"] = 0.123456789
    (copy / "summary.json").write_text(json.dumps(summary))
    text = (copy / "config.yaml").read_text(encoding="utf-8").replace("weight_decay: 0.01", "weight_decay: 0.5")
    (copy / "config.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit) as end:
        main(["report", str(run), str(copy)])
    assert end.value.code == 2
    assert "--to" in capsys.readouterr().err
    target = tmp_path / "both.html"
    with pytest.raises(SystemExit) as end:
        main(["report", str(run), str(copy), "--to", str(target)])
    assert end.value.code in (0, None)
    page = Page(target)
    assert {"0.123456789", str(read_json(run / "summary.json")["metrics"]["eval/accuracy"])} <= page.all_values()
    assert page.row("train.weight_decay")[1:] == ["0.01", "0.5"]
    assert not [row for row in page.rows if row and row[0] in ("train.lr", "name", "output")]
    with pytest.raises(UserError, match="named twice"):
        write_comparison([run, run], target)


def test_what_is_no_run_is_refused_with_the_reason(tmp_path: Path, copy: Path) -> None:
    with pytest.raises(UserError, match="no run"):
        write_report(tmp_path)
    (tmp_path / "config.yaml").write_text("a: 1\n")
    with pytest.raises(UserError, match="has not started"):
        write_report(tmp_path)
    (tmp_path / "advice.json").write_text("{}")
    with pytest.raises(UserError, match=r"advice\.svg"):
        write_report(tmp_path)
    (copy / "plan.json").write_text("{ half")
    with pytest.raises(UserError, match=r"plan\.json: can't be read"):
        write_report(copy)


def test_the_first_rank_writes_the_page_in_little_time_and_a_failure_is_a_warning(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No exception and no collective: this process has joined no process group."""
    copy = copy.rename(copy.with_name("glue[train]"))
    target = copy / "report.html"
    target.unlink()
    start = time.thread_time()
    for rank in (1, 0):
        write_page(copy, World("torchrun", rank, rank, 2, 2, torch.device("cpu")), Reporter(rank == 0))
        assert target.exists() == (rank == 0), "only the first rank writes"
    assert time.thread_time() - start < 2
    target.unlink()
    target.mkdir()
    report = Reporter(True)
    report.open_files(copy)
    write_page(copy, World("torchrun", 0, 0, 2, 2, torch.device("cpu")), report)
    report.finish({}, 0)
    assert "warning: report.html was not written (UserError" in capsys.readouterr().out
    told = f"warning: report.html was not written (UserError: {target}: can't be written"
    assert told in (copy / "log.txt").read_text(encoding="utf-8")


def test_an_evaluation_is_told_on_the_screen_and_in_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = Reporter(True)
    report.open_files(tmp_path)
    report.start_progress(86)
    report.log(43, {"eval/loss": 0.5, "eval/accuracy": 0.75})
    report.finish({}, 0)
    told = "step 43/86: validation loss 0.5000, accuracy 0.7500\n"
    assert told in capsys.readouterr().out
    assert told in (tmp_path / "log.txt").read_text(encoding="utf-8")


def test_features_have_a_page_and_no_comparison(tmp_path: Path, run: Path) -> None:
    folder = tmp_path / "heads"
    folder.mkdir()
    result = {
        "depth": "block <0>", "head": "soft<max>", "accuracy": 0.8125, "low": 0.7, "high": 0.9, "test_accuracy": None,
        "cv_accuracy": 0.79, "regularisation": 1.0, "fit_s": 0.5, "converged": False, "num_features": 32,
    }  # fmt: skip
    other = {**result, "depth": "head", "accuracy": 0.5, "low": 0.4, "high": 0.6}
    summary = {
        "status": "finished", "best": result, "results": [result, other], "samples_per_s": 12.5, "total_s": 3.25,
        "extracted_rows": 188, "world_size": 1, "folded_note": "none", "metrics": {},
    }  # fmt: skip
    (folder / "plan.json").write_text(json.dumps({"task": "features", "model": "m"}))
    (folder / "summary.json").write_text(json.dumps(summary))
    page = Page(write_report(folder))
    assert {"0.8125", "0.5", "12.5"} <= page.all_values()
    assert page.row("head")[2] == "0.500"
    assert "svg" in {tag for tag, _ in page.tags}
    with pytest.raises(UserError, match="extracted features"):
        write_comparison([run, folder], tmp_path / "x.html")


def write_metrics(path: Path, num_steps: int, start: int = 1) -> None:
    with path.open("w") as file:
        for step in range(start, num_steps + 1):
            row = {"step": step, "time": 1e9 + step, "train/loss": 1 / step, "perf/step_s": 0.5, "x": "y" * 60}
            file.write(json.dumps(row) + "\n")
            if step % 1000 == 0:
                file.write(json.dumps({"step": step, "time": 1e9 + step, "eval/loss": float(step)}) + "\n")


def test_a_large_file_is_thinned_but_keeps_evaluations_and_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_metrics(tmp_path / "m.jsonl", 5500)
    whole = read_metrics(tmp_path / "m.jsonl")
    assert whole.stride == 1
    assert whole.train_s == 2750
    monkeypatch.setattr("dist_finetune.html_report.metrics.WHOLE_BYTES", 100_000)
    thin = read_metrics(tmp_path / "m.jsonl")
    assert 5 < thin.stride < 20
    assert len(thin.of("train/loss")[0]) == pytest.approx(5500 / thin.stride, rel=0.02)
    assert thin.of("eval/loss")[1].tolist() == [1000.0, 2000.0, 3000.0, 4000.0, 5000.0]
    assert thin.last_step == 5500
    assert thin.train_s == pytest.approx(2750, rel=0.02)


def test_rows_done_again_count_once(tmp_path: Path) -> None:
    rows: Sequence[dict[str, float]] = (
        {"step": 1, "time": 10.0, "train/loss": 3.0},
        {"step": 2, "time": 11.0, "train/loss": 2.0},
        {"step": 2, "time": 42.0, "train/loss": 1.5},
    )
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": "x"}\n[1]\n')
    assert read_metrics(path).of("train/loss")[1].tolist() == [3.0, 1.5]
    assert read_metrics(tmp_path / "none.jsonl").last_step == 0


def test_what_is_no_number_is_null_in_the_files_and_nan_where_they_are_read(tmp_path: Path, run: Path) -> None:
    with Reporter(is_first=True) as report:
        report.open_files(tmp_path)
        report.log(1, {"eval/pearson": float("nan"), "train/grad_norm": float("inf"), "eval/mse": 2.0})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    row = json.loads(line, parse_constant=pytest.fail)
    assert (row["eval/pearson"], row["train/grad_norm"], row["eval/mse"]) == (None, None, 2.0)
    assert np.isnan(read_metrics(tmp_path / "metrics.jsonl").of("eval/pearson")[1]).tolist() == [True]
    summary = json.loads((run / "summary.json").read_text())
    summary["metrics"]["eval/loss"] = None
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert math.isnan(load_summary(tmp_path).metrics["eval/loss"])


def test_running_mean_is_that_of_the_last_values() -> None:
    values = np.array([1.0, 3.0, np.nan, 5.0, 7.0])
    assert running_mean(values, 2).tolist() == [1.0, 2.0, 3.0, 5.0, 6.0]


@pytest.mark.parametrize(
    ("num_steps", "value"), [(1, 1.0), (2, 0.0), (100, 1e-7), (100, 1e6), (100, float("nan")), (20_000, 1.0)]
)
def test_any_curve_can_be_drawn(num_steps: int, value: float) -> None:
    steps = np.arange(1, num_steps + 1)
    line = Line("train/loss", steps, np.full(num_steps, value), 0, rough=True)
    text = curves("c", [line], "loss", may_be_log=True)
    ElementTree.fromstring(text)
    assert len(text) < 200_000, "a long run must not make a page that no browser draws"


def test_a_model_of_many_parts_keeps_its_labels(tmp_path: Path) -> None:
    parts = ["embeddings", *(f"block {i}" for i in range(24)), "neck", "head"]
    phases = [(f"phase-{p}", [(0, 10) if i >= p * 4 else (10, 0) for i in range(len(parts))]) for p in range(6)]
    text = frozen_parts("parts", parts, phases)
    words = [element.text for element in ElementTree.fromstring(text).iter() if element.tag.endswith("}text")]
    assert [str(i) for i in range(24)] == [word for word in words if word and word.isdigit()][-24:]
    assert [f"phase-{p}" for p in range(6)] == [word for word in words if word and word.startswith("phase-")]


def test_names_in_any_script_are_drawn_without_a_warning() -> None:
    text = frozen_parts("parts", ["head"], [("\u7b2c\u4e00", [(0, 10)]), ("\u7b2c\u4e8c", [(10, 0)])])
    assert ">\u7b2c\u4e00</text>" in text


def test_scores_that_are_no_classes_give_no_confusions(tmp_path: Path) -> None:
    folder = tmp_path / "predictions"
    folder.mkdir()
    scores, labels = torch.eye(3), torch.tensor([0, 1, 2])

    def found(scores: torch.Tensor, labels: torch.Tensor, num_classes: int = 3) -> bool:
        save_file({"logits": scores, "labels": labels}, folder / "test.safetensors")
        return read_confusion(tmp_path, "test", tuple(map(str, range(num_classes)))) is not None

    assert found(scores, labels)
    assert not found(scores, labels.double()), "regression, or several labels a row"
    assert not found(scores, torch.tensor([0, 1, -100]))
    assert not found(scores, labels, num_classes=4)
    assert not found(scores[:, 0].contiguous(), labels)
    assert read_confusion(tmp_path, "validation", ("a", "b")) is None


def test_names_in_brackets_are_said_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    """A data set's split, a regression's unit: to rich they would be styles, or an error."""
    report, words = Reporter(is_first=True), "glue:sst2[train], rate [/min]"
    report.say(words)
    report.say(Group(words))
    assert capsys.readouterr().out == f"{words}\n{words}\n"


def test_a_full_disk_costs_metrics_and_no_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with Reporter(is_first=True) as report:
        report.open_files(tmp_path)
        for step in range(3):
            report.log(step, {"eval/accuracy": 0.5})
    told = f"WARNING {tmp_path / 'metrics.jsonl'} can't be written: No space left on device. Training goes on"
    assert capsys.readouterr().out.count("WARNING") == 1
    assert (tmp_path / "log.txt").read_text(encoding="utf-8").count(told) == 1


def test_a_full_disk_costs_lines_of_the_log_and_one_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "log.txt").symlink_to("/dev/full")
    with Reporter(is_first=True) as report:
        report.say("before there was a folder")
        report.open_files(tmp_path)
        report.notes(["the disk is full", "it still is"])
    out, err = capsys.readouterr()
    assert err == "", "logging printed a traceback of its own"
    assert out.count(f"WARNING {tmp_path / 'log.txt'} can't be written: No space left on device. Training goes on") == 1
    assert out.count("WARNING") == 1
    assert "note: it still is" in out
