"""What a run tells: metrics.jsonl, log.txt, the terminal and trackers. Silent on every rank but the first."""

import logging
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dist_finetune.errors import UserError
from dist_finetune.run_folder import json_text
from dist_finetune.spec import Spec, TrackSpec
from dist_finetune.tracking import WandbRun, require_login, start_wandb

TENSORBOARD = "tensorboard"  # its folder in a run's
PLAIN_LINE_EVERY_S = 5.0  # between two progress lines where the output is no terminal


class Sink(Protocol):
    """Something that takes metrics by step: W&B, TensorBoard."""

    def log(self, step: int, metrics: dict[str, float]) -> None: ...

    def finish(self, summary: dict[str, Any], exit_code: int) -> None: ...


class Reporter:
    """Writes nothing until `open_files`, and never anything on a rank other than the first."""

    def __init__(self, is_first: bool) -> None:
        self._is_first = is_first
        self._metrics: Any = None
        self._lost_metrics = False
        self.has_files = False
        """True once the run's folder is there, on every rank."""
        self._sinks: list[Sink] = []
        self._early: list[str] = []
        # a name such as glue:sst2[train] is no markup
        self._console = Console(file=sys.stdout, quiet=not is_first, soft_wrap=True, markup=False)
        self._progress: Progress | None = None
        self._total_steps, self._last_line_s = 0, 0.0
        self.wandb_mode = "off"

    def open_files(self, folder: Path) -> None:
        """Starts metrics.jsonl and log.txt in an existing run folder."""
        self.has_files = True
        if not self._is_first:
            return
        self._metrics = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        handler = LogFile(folder / "log.txt", self.say)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger = logging.getLogger("dist_finetune")
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        for message in self._early:
            logger.info(message)
        self._early = []

    def open_trackers(self, spec: Spec, folder: Path, config: dict[str, Any], step: int) -> None:
        """Starts the trackers that `track` asks for, of a run that goes on after optimizer step `step`."""
        if not self._is_first:
            return
        run = start_wandb(spec.track, folder, spec.name, config)
        if isinstance(run, WandbRun):
            self.wandb_mode = run.mode
            self._sinks.append(run)
            self.say(f"W&B: {run.mode}, {run.url or folder / 'wandb'}")
        if spec.track.tensorboard:
            self._sinks.append(TensorBoard(folder / TENSORBOARD, step))

    def say(self, message: Any) -> None:
        """A line (or a rich table) for the user, and for log.txt."""
        if not self._is_first:
            return
        (self._progress.console if self._progress else self._console).print(message, highlight=False)
        if isinstance(message, str) and not self.has_files:
            self._early.append(message)  # said before there was a run folder
        elif isinstance(message, str):
            logging.getLogger("dist_finetune").info(message)

    def notes(self, messages: Iterable[str]) -> None:
        """A line for each thing that is allowed, but that the user may not have meant."""
        for message in messages:
            self.say(f"note: {message}")

    def start_progress(self, total_steps: int) -> None:
        """Shows a bar on a terminal; elsewhere `log` prints a line every few seconds."""
        self._total_steps, self._last_line_s = total_steps, time.monotonic()
        if self._is_first and self._console.is_terminal:
            columns = [TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}")]
            self._progress = Progress(*columns, TimeRemainingColumn(), console=self._console, transient=True)
            self._progress.add_task("steps", total=total_steps, text="")
            self._progress.start()

    def stop_progress(self) -> None:
        """Takes the bar away."""
        if self._progress:
            self._progress.stop()
            self._progress = None

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Records metrics at optimizer step `step` everywhere."""
        if not self._is_first:
            return
        if self._metrics:
            self._write_metrics(json_text({"step": step, "time": time.time(), **metrics}) + "\n")
        for sink in self._sinks:
            sink.log(step, metrics)
        if "train/loss" in metrics:
            self._show_progress(
                step, f"loss {metrics['train/loss']:.4f}, {metrics['perf/samples_per_s']:.0f} samples/s"
            )

        scores = [
            f"{key.removeprefix('eval/')} {value:.4f}" for key, value in metrics.items() if key.startswith("eval/")
        ]
        if scores:
            self.say(f"step {step}/{self._total_steps}: validation {', '.join(scores)}")

    def _write_metrics(self, line: str) -> None:
        """A full disk costs metrics, said once, and no training: it may have room again before the next checkpoint."""
        try:
            self._metrics.write(line)
            self._metrics.flush()
        except OSError as error:
            if not self._lost_metrics:
                self._lost_metrics = True
                self.say(lost(self._metrics.name, error, "metrics"))

    def _show_progress(self, step: int, text: str) -> None:
        if self._progress:
            self._progress.update(self._progress.task_ids[0], completed=step, text=text)
        elif time.monotonic() - self._last_line_s > PLAIN_LINE_EVERY_S:
            self._last_line_s = time.monotonic()
            self._console.print(f"step {step}/{self._total_steps}: {text}", highlight=False)

    def finish(self, summary: dict[str, Any], exit_code: int) -> None:
        """Closes files and trackers; `summary` becomes the trackers' summary."""
        self.stop_progress()
        self.has_files = False
        for sink in self._sinks:
            sink.finish(summary, exit_code)
        self._sinks = []
        if self._metrics:
            with suppress(OSError):  # a full disk again; the file is closed all the same
                self._metrics.close()
            self._metrics = None
        logger = logging.getLogger("dist_finetune")
        for handler in list(logger.handlers):
            if isinstance(handler, logging.FileHandler):
                with suppress(OSError):
                    handler.close()
                logger.removeHandler(handler)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish({}, 0 if error is None else 1)


class LogFile(logging.FileHandler):
    """log.txt, whose disk may be full: told once by `say`, where logging itself would print a traceback a line."""

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        super().__init__(path, encoding="utf-8")
        self._say, self._is_told = say, False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._is_told:
            self._is_told = True
            self._say(lost(self.baseFilename, error, "lines"))


def lost(path: str, error: OSError, what: str) -> str:
    """The words for a file of the run that can't be written, which costs `what` and no training."""
    return (
        f"WARNING {path} can't be written: {error.strerror or error}. Training goes on; {what} are missing there until "
        "it can be written again"
    )


def require_trackers(track: TrackSpec) -> None:
    """Raises UserError where a tracker that `track` asks for can't be had here, before anything is loaded."""
    require_login(track)
    if track.tensorboard and find_spec("tensorboard") is None:
        raise UserError("track.tensorboard: needs the package tensorboard: pip install tensorboard")


class TensorBoard:
    """TensorBoard's event files, one a start. Every failure after that is a warning, never an error."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard leaves out what an earlier start has written of later steps
        self._writer = SummaryWriter(str(folder), purge_step=step + 1)
        self._is_lost = False

    def log(self, step: int, metrics: dict[str, float]) -> None:
        def add() -> None:
            for name, value in metrics.items():
                self._writer.add_scalar(name, value, step)

        if not self._is_lost:
            self._try(add)

    def finish(self, summary: dict[str, Any], exit_code: int) -> None:
        self._try(self._writer.close)

    def _try(self, work: Callable[[], None]) -> None:
        """The writer's thread ends at its first error, as of a full disk, and each later call raises that again."""
        try:
            work()
        except Exception as error:
            if not self._is_lost:
                logging.getLogger(__name__).warning("TensorBoard: %s; its curves end here, training goes on", error)
            self._is_lost = True
