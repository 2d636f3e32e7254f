"""report.html of one run, and a page that compares several."""

import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from dist_finetune import __version__
from dist_finetune.errors import UserError
from dist_finetune.html_report import facts
from dist_finetune.html_report.figures import (
    Line,
    Marks,
    curves,
    depth_scores,
    frozen_parts,
    running_mean,
    smoothing_window,
)
from dist_finetune.html_report.predictions import read_confusion
from dist_finetune.html_report.record import RunRecord, read_record
from dist_finetune.run_folder import flat, write_text
from dist_finetune.tasks.names import LOSS_UNITS, LOWER_IS_BETTER, SHARES

FILE = "report.html"
SPLITS = ("validation", "test")
NORM = "L2 norm before clipping"
RATE = "highest learning rate"
ROUGH = ("train/loss", "train/grad_norm")  # they jump from step to step, and are read by their running mean


def write_report(folder: Path, to: Path | None = None) -> Path:
    """Writes the page of a run, <folder>/report.html unless `to` names another file, and returns its path.

    Raises UserError where the folder holds no run that has started, or the place can't be written.
    """
    record = read_record(folder)
    text = _render_features(record) if record.is_features else _render_run(record)
    return _write(to or folder / FILE, text)


def write_comparison(folders: Sequence[Path], to: Path) -> Path:
    """Writes a page that shows several training runs side by side, and returns its path. Raises UserError."""
    records = [read_record(folder) for folder in folders]
    for record in records:
        if record.is_features:
            raise UserError(
                f"{record.folder} extracted features and has no curves to compare; make its page alone: "
                f"dist-finetune report {shlex.quote(str(record.folder))}"
            )
    return _write(to, _render_comparison(records))


def _write(path: Path, text: str) -> Path:
    try:
        write_text(path, text)
    except OSError as error:
        raise UserError(f"{path}: can't be written: {error.strerror or error}; name another file with --to") from None
    return path


def _template(name: str) -> Any:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["version"] = __version__
    environment.filters["heat"] = lambda share: f"{100 * share:.0f}%"
    return environment.get_template(name)


def _render_run(record: RunRecord) -> str:
    phases = facts.phase_parts(record)
    classes = tuple(str(name) for name in record.plan.get("data", {}).get("classes", ()))
    confusions = [found for split in SPLITS if (found := read_confusion(record.folder, split, classes))]
    return str(
        _template("run.html").render(
            record=record,
            tiles=facts.headline(record),
            decisions=facts.run_facts(record),
            frozen=facts.frozen_words(phases),
            frozen_plot=_frozen_plot(phases),
            plots=_run_plots(record),
            comparisons=facts.planned_and_actual(record),
            memory_note=facts.memory_note(record),
            confusions=[(found, facts.class_rows(found)) for found in confusions],
            confused=("words", "tag") if record.task == "token-classification" else ("rows", "class"),
            shown_classes=facts.SHOWN_CLASSES,
            shown_worst=facts.SHOWN_WORST,
            attempts=facts.attempts(record),
            environment=facts.environment_facts(record),
            settings=[(key, _shown(value)) for key, value in sorted(_settings(record).items())],
        )
    )


def _render_features(record: RunRecord) -> str:
    results = record.summary.get("results", [])
    depths = list(dict.fromkeys(result["depth"] for result in results))
    heads: dict[str, list[tuple[str, float, float, float]]] = {}
    for result in results:
        heads.setdefault(result["head"], []).append(
            (result["depth"], result["accuracy"], result["low"], result["high"])
        )
    return str(
        _template("features.html").render(
            record=record,
            results=results,
            best=record.summary.get("best"),
            plot=Markup(depth_scores("depths", depths, heads)) if results else "",
            environment=facts.environment_facts(record),
            settings=[(key, _shown(value)) for key, value in sorted(_settings(record).items())],
        )
    )


def _render_comparison(records: Sequence[RunRecord]) -> str:
    names = _short_names([record.folder for record in records])
    settings = [_settings(record) for record in records]
    keys = sorted({key for one in settings for key in one} - {"name", "output"})
    different = [key for key in keys if len({str(one.get(key)) for one in settings}) > 1]
    return str(
        _template("compare.html").render(
            runs=list(zip(names, records, strict=True)),
            columns=[_run_row(record) for record in records],
            plots=_shared_plots(records, names),
            different=[(key, [_shown(one.get(key)) for one in settings]) for key in different],
        )
    )


def _settings(record: RunRecord) -> dict[str, Any]:
    """The config by dotted key, entries of lists of sections by their number, without what was left empty."""
    return {key: value for key, value in flat(_numbered(record.config)).items() if value not in (None, [], {}, "")}


def _numbered(node: Any) -> Any:
    if isinstance(node, list) and any(isinstance(value, dict) for value in node):
        node = dict(enumerate(node))
    return {key: _numbered(value) for key, value in node.items()} if isinstance(node, dict) else node


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return facts.NONE if value is None else str(value)


def _frozen_plot(phases: Sequence[facts.PhaseParts]) -> Markup | str:
    if not phases or not phases[-1].parts:
        return ""
    parts = [part for part, _, _ in phases[-1].parts]
    counts = [(phase.name, [(frozen, trainable) for _, frozen, trainable in phase.parts]) for phase in phases]
    return Markup(frozen_parts("parts", parts, counts))


def _run_plots(record: RunRecord) -> list[dict[str, Any]]:
    """Title, plot and words of each curve that the run has."""
    series = record.metrics.series
    starts = (phase["first_step"] for phase in record.plan.get("phases", ())[1:])
    marks = Marks(record.resumed_at, tuple(step for step in starts if step <= record.steps))
    names = [key.removeprefix("eval/") for key in series if key.startswith("eval/")]
    shares = [f"eval/{name}" for name in names if name in SHARES]
    errors = [f"eval/{name}" for name in names if name in LOWER_IS_BETTER and name != "loss"]
    others = [f"eval/{name}" for name in names if name not in (*SHARES, *LOWER_IS_BETTER)]
    plots = []
    for title, keys, unit, may_be_log, is_share in (
        ("Loss", ["train/loss", "eval/loss"], LOSS_UNITS[record.task], True, False),
        ("Validation scores", shares, "score, 0 to 1", False, True),
        ("Validation agreement", others, "score, 1 at best", False, False),
        ("Validation errors", errors, "error, 0 at best", True, False),
        ("Learning rate", ["train/lr"], RATE, False, False),
        ("Gradient norm", ["train/grad_norm"], NORM, True, False),
    ):
        found = [key for key in keys if key in series]
        if found:
            name = title.split()[-1].lower()
            lines = [_line(key, *series[key], number) for number, key in enumerate(found)]
            log_from = _lowest_rate(record) if title == "Learning rate" else None
            svg = curves(name, lines, unit, marks, may_be_log=may_be_log, is_share=is_share, log_from=log_from)
            plots.append({"title": title, "svg": Markup(svg), "ends": [_ends(key, *series[key]) for key in found]})
    return plots


def _lowest_rate(record: RunRecord) -> float | None:
    """Where a logarithmic axis of learning rates starts: asked for where the rates of phases lie far apart."""
    phases = record.plan.get("phases", ())
    peaks = [max((group["lr"] for group in phase["groups"]), default=0.0) for phase in phases]
    peaks = [peak for peak in peaks if peak > 0]
    return min(peaks) / 50 if peaks and max(peaks) > 8 * min(peaks) else None


def _line(key: str, steps: np.ndarray, values: np.ndarray, colour: int) -> Line:
    rough = key in ROUGH
    window = smoothing_window(len(values)) if rough else 1
    label = f"{key}, mean of {window} steps" if window > 1 else key
    return Line(label, steps, values, colour, rough, "o" if key.startswith("eval/") else "")


def _ends(key: str, steps: np.ndarray, values: np.ndarray) -> dict[str, Any]:
    """A curve's first and last values, and its best where it is a score or loss of validation rows."""
    ends = {"key": key, "first": float(values[0]), "last": float(values[-1]), "step": int(steps[-1]), "best": None}
    if key.startswith("eval/") and np.isfinite(values).all():
        at = int(values.argmin() if key.removeprefix("eval/") in LOWER_IS_BETTER else values.argmax())
        ends["best"], ends["best_step"] = float(values[at]), int(steps[at])
    return ends


def _short_names(folders: Sequence[Path]) -> list[str]:
    """Folder names; with as much of the path before them as tells them apart."""
    paths = [folder.absolute() for folder in folders]
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"the same run is named twice: {', '.join(map(str, folders))}")


def _run_row(record: RunRecord) -> dict[str, Any]:
    """One run's column of the comparison."""
    name, before, after = record.headline
    phases = facts.phase_parts(record)
    frozen, trainable = (phases[-1].frozen, phases[-1].trainable) if phases else (0, 0)
    topology = record.plan.get("topology", {})
    world_size = topology.get("num_nodes", 1) * topology.get("processes_per_node", 1)
    peak = record.summary.get("peak_memory_gib", record.metrics.last("mem/peak_gib"))
    return {
        "status": record.status,
        "model": record.plan.get("card", {}).get("name"),
        "strategy": f"{record.plan.get('strategy')} x {world_size}",
        "metric": name,
        "before": before,
        "after": after,
        "test": record.summary.get("metrics", {}).get(f"test/{name}"),
        "steps": record.steps,
        "train": facts.duration(record.train_s),
        "train_s": record.train_s,
        "samples_per_s": record.samples_per_s,
        "frozen": frozen / max(1, frozen + trainable),
        "trainable": trainable,
        "peak": peak,
        "attempts": record.attempts,
    }


def _shared_plots(records: Sequence[RunRecord], names: Sequence[str]) -> list[dict[str, Any]]:
    """A plot for each metric that two runs or more have, a colour for each run."""
    keys: Iterable[str] = dict.fromkeys(key for record in records for key in record.metrics.series)
    scores = sorted(key for key in keys if key.startswith("eval/") and key != "eval/loss")
    unit = " or ".join(dict.fromkeys(LOSS_UNITS[record.task] for record in records))
    wanted = [("train/loss", unit), ("eval/loss", unit)]
    wanted += [*((key, "score") for key in scores), ("train/lr", RATE), ("train/grad_norm", NORM)]
    plots = []
    for key, unit in wanted:
        lines = []
        for number, record in enumerate(records):
            steps, values = record.metrics.of(key)
            if len(steps):
                shown = running_mean(values, smoothing_window(len(values))) if key in ROUGH else values
                lines.append(Line(names[number], steps, shown, number, marker="o" if key.startswith("eval/") else ""))
        if lines:
            name = key.removeprefix("eval/")
            is_score = key in scores and name not in LOWER_IS_BETTER
            svg = curves(
                key.replace("/", "-"),
                lines,
                unit,
                may_be_log=not is_score and key != "train/lr",
                is_share=name in SHARES,
                legend=False,
            )
            mean = ", running mean" if key in ROUGH else ""
            plots.append({"title": f"{key}{mean}", "svg": Markup(svg)})
    return plots
