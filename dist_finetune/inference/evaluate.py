"""A run's model on rows with labels: its own held-out rows, or others of the same columns and classes."""

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset

from dist_finetune.data.tables import read_table, read_tables
from dist_finetune.errors import UserError
from dist_finetune.evaluate import Evaluation, evaluate
from dist_finetune.inference.saved_run import SavedRun, opened_run
from dist_finetune.inference.scores import ClassScore, calibration_error, class_scores
from dist_finetune.run_folder import EVALUATIONS, json_text, read_summary
from dist_finetune.tasks.names import TaskName
from dist_finetune.world import on_first, together

Split = Literal["validation", "test"]


@dataclass(frozen=True)
class RunEvaluation:
    """Metrics of a run's model on some rows, and on the first rank the logits and labels that they follow from."""

    folder: Path
    step: int | None
    """Optimizer step of the model; None where summary.json does not say, as of a head fitted on features."""
    head: str | None
    """The best head of a feature run, such as `svm at block 3`, where it is not the last layer of model/."""
    data: str
    task: TaskName
    num_rows: int
    precision: str
    device: str
    world_size: int
    is_first: bool
    """True on the one rank that speaks to the user."""
    evaluation: Evaluation
    calibration_error: float | None
    classes: tuple[ClassScore, ...]
    not_recorded: str | None = None
    """Why evaluations.jsonl has no line of it, as in a folder that can't be written."""

    @property
    def metrics(self) -> dict[str, float]:
        """Those of the task, see `tasks.names.METRICS`."""
        return self.evaluation.metrics

    def to_json(self) -> dict[str, Any]:
        """JSON values, without logits and labels."""
        out = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del out["evaluation"], out["is_first"], out["not_recorded"]
        classes = [dataclasses.asdict(score) for score in self.classes]
        return {**out, "folder": str(self.folder), "metrics": self.metrics, "classes": classes}

    def lines(self) -> str:
        """For people."""
        where = f"{self.device}, {self.precision}" + (f", {self.world_size} processes" if self.world_size > 1 else "")
        known = {} if self.calibration_error is None else {"calibration error": self.calibration_error}
        named = {**self.metrics, **known}
        values = "\n".join(f"{name:<17} {value:.4f}" for name, value in named.items())
        kind = {"multilabel": "label", "token-classification": "entity"}.get(self.task, "class")
        width = max(len(name) for name in (kind, *(score.name for score in self.classes)))
        table = [f"{kind:<{width}} {'true' if kind == 'entity' else 'rows':>7} {'precision':>9} {'recall':>7}"]
        table += [f"{c.name:<{width}} {c.num_rows:>7,} {c.precision:>9.3f} {c.recall:>7.3f}" for c in self.classes]
        model = f"{self.folder}, {self.head}," if self.head else self.folder / "model"
        head = f"{model} on {self.data} ({self.num_rows:,} rows; {where})"
        return "\n".join([head, values, *(table if self.classes else ())])


def evaluate_run(folder: Path, data: str | None = None, split: Split | None = None) -> RunEvaluation:
    """Evaluates the model of a run as one rank of the job it finds itself in (alone: a job of one).

    On `data`, named as data.validation is (a file, class folders, builtin:NAME, a hub id), or on a `split` of the run:
    left out, its test rows if it has some, else its validation rows. The encoding is the run's. Adds a line to
    evaluations.jsonl in the run's folder, where that can be written. Raises UserError for a run without a model, and
    for rows that don't fit it.
    """
    if data is not None and split is not None:
        raise UserError(f"{data} and --split {split}: both say what to evaluate on; leave one out")
    with opened_run(folder) as (run, world):
        name = data or split or ("test" if run.spec.data.test else "validation")
        table = together(lambda: _table(run, data, name))
        rows = together(lambda: run.encode(table))
        evaluation = evaluate(run, rows, run.eval_batch_size, world)
        # the first rank has the logits
        calibration, classes = on_first(
            world,
            lambda: (calibration_error(evaluation, rows.task), class_scores(evaluation, rows.task, rows.classes)),
        )
        found = RunEvaluation(
            folder=folder,
            step=read_summary(folder).get("kept_step"),
            head=run.best_head.name if run.best_head else None,
            data=name,
            task=rows.task,
            num_rows=rows.num_rows,
            precision=run.precision,
            device=world.device.type,
            world_size=world.world_size,
            is_first=world.is_first,
            evaluation=evaluation,
            calibration_error=calibration,
            classes=classes,
        )
        return dataclasses.replace(found, not_recorded=on_first(world, lambda: _record(found)))


def _table(run: SavedRun, data: str | None, name: str) -> Dataset:
    spec, columns, classes = run.spec.data, run.columns, run.data.classes
    if data is not None:
        return read_table([data], "DATA", spec.columns, columns, classes)
    if name == "test":
        if spec.test is None:
            raise UserError(f"--split test: {run.folder} has no data.test; name the data to evaluate on")
        return read_table(spec.test, "test", spec.columns, columns, classes)
    if not isinstance(spec.validation, float):
        return read_table(spec.validation, "validation", spec.columns, columns, classes)
    tables = read_tables(spec, run.spec.train.seed, decode_images=False, task=run.data.task)
    if tables.fingerprint != run.data.fingerprint:
        raise UserError(
            f"the rows of data.train are not those that {run.folder} held data.validation={spec.validation:g} out of: "
            "they have changed since. Name the data to evaluate on"
        )
    return tables.validation


def _record(found: RunEvaluation) -> str | None:
    """Adds the line, or returns why it can't be: the result is worth more than its record."""
    path = found.folder / EVALUATIONS
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json_text({"time": time.time(), **found.to_json()}) + "\n")
    except OSError as error:
        return f"{path}: can't be written: {error.strerror or error}; the result was not recorded"
    return None
