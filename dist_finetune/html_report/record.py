"""What the files of a run say, read without torch: also of a run that was stopped, failed, or goes on."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_finetune.errors import UserError
from dist_finetune.html_report.metrics import Metrics, read_metrics
from dist_finetune.run_folder import ATTEMPTS, json_row
from dist_finetune.run_folder import METRICS as METRICS_FILE
from dist_finetune.tasks.names import METRICS, TaskName


@dataclass(frozen=True)
class RunRecord:
    """One training or feature run; what its folder does not hold is empty."""

    folder: Path
    config: dict[str, Any]
    plan: dict[str, Any]
    freeze: dict[str, Any]
    environment: dict[str, Any]
    summary: dict[str, Any]
    submissions: tuple[dict[str, Any], ...]
    starts: tuple[dict[str, Any], ...]
    """attempts.jsonl: attempt, step, time, host, world_size and strategy of each start."""
    metrics: Metrics

    @property
    def name(self) -> str:
        return self.folder.absolute().name

    @property
    def status(self) -> str:
        """finished, stopped or failed; "unfinished" where it runs still or was killed."""
        return str(self.summary.get("status") or "unfinished")

    @property
    def is_features(self) -> bool:
        """True for a run that extracted features instead of training."""
        return self.plan.get("task") == "features"

    @property
    def task(self) -> TaskName:
        """What the run's labels are for; runs of an earlier version don't say."""
        task: TaskName = self.plan.get("data", {}).get("task", "classification")
        return task

    @property
    def headline(self) -> tuple[str, float | None, float | None]:
        """The metric that tells most, before and after training: as the summary has it, else as logged."""
        names = [key.removeprefix("eval/") for key in self.metrics.series if key.startswith("eval/")]
        name = next((name for name in (*METRICS[self.task], *names) if name in names), METRICS[self.task][0])
        key = f"eval/{name}"
        steps, values = self.metrics.of(key)
        first = float(values[0]) if len(values) and steps[0] == 0 else None
        last = float(values[-1]) if len(values) and steps[-1] > 0 else None
        before = self.summary.get("metrics_before", {}).get(key, first)
        return name, before, self.summary.get("metrics", {}).get(key, last)

    @property
    def steps(self) -> int:
        """Optimizer steps taken."""
        return int(self.summary.get("steps", self.metrics.last_step))

    @property
    def train_s(self) -> float:
        """Seconds of training steps, over all attempts."""
        return float(self.summary.get("train_s", self.metrics.train_s))

    @property
    def samples_per_s(self) -> float | None:
        """Training samples a second over the whole run."""
        samples = self.metrics.last("progress/samples")
        return samples / self.train_s if samples and self.train_s else None

    @property
    def attempts(self) -> int:
        """Starts of the run, as far as its files tell."""
        return int(self.summary.get("attempts", max((start["attempt"] for start in self.starts), default=1)))

    @property
    def resumed_at(self) -> tuple[int, ...]:
        """Steps from which later attempts went on."""
        return tuple(sorted({int(start["step"]) for start in self.starts if start["attempt"] > 1}))


def read_record(folder: Path) -> RunRecord:
    """The files of a run. Raises UserError where `folder` holds no run that has started, or a damaged file."""
    if (folder / "advice.json").exists():
        raise UserError(
            f"{folder} holds advice, and a report is made of runs: read its advice.json, and see its advice.svg. The "
            "run that follows from it is started with its advice.yaml"
        )
    if not (folder / "plan.json").exists():
        what = "has not started yet: no plan.json" if (folder / "config.yaml").exists() else "is no run: no plan.json"
        raise UserError(f"{folder} {what}. Name the folder that `run` printed, <output>/<name>")
    return RunRecord(
        folder=folder,
        config=_read_config(folder / "config.yaml"),
        plan=_read_json(folder / "plan.json"),
        freeze=_read_json(folder / "freeze.json"),
        environment=_read_json(folder / "environment.json"),
        summary=_read_json(folder / "summary.json"),
        submissions=_read_lines(folder / "submissions.jsonl"),
        starts=_read_lines(folder / ATTEMPTS),
        metrics=read_metrics(folder / METRICS_FILE),
    )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: can't be read: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds no JSON object")
    return found


def _read_config(path: Path) -> dict[str, Any]:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    if not path.exists():
        return {}
    try:
        found = YAML(typ="safe").load(path)
    except (OSError, YAMLError) as error:
        raise UserError(f"{path}: can't be read: {error}") from None
    return found if isinstance(found, dict) else {}


def _read_lines(path: Path) -> tuple[dict[str, Any], ...]:
    """The objects of a file of JSON lines, see `json_row`."""
    if not path.exists():
        return ()
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error}") from None
    return tuple(row for row in map(json_row, lines) if row is not None)
