"""`track.tensorboard`: what was logged is in its files, one story over several starts, and never in training's way."""

import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dist_finetune.report import Reporter
from dist_finetune.spec import Spec
from dist_finetune.spec_file import load_spec

events = pytest.importorskip(
    "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is missing: pip install '.[test]'"
)


@pytest.fixture
def spec(tmp_path: Path) -> Spec:
    track = {"wandb": "off", "tensorboard": True}
    return load_spec({"model": {"name": "demo:minilm"}, "data": {"train": "x.csv"}, "track": track, "name": "job"})


def curve(run: Path, key: str) -> list[tuple[int, float]]:
    found = events.EventAccumulator(str(run / "tensorboard"))
    found.Reload()
    return [(event.step, event.value) for event in found.Scalars(key)]


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """The kernel refuses what would make a file larger, as a quota does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_resumed_run_has_one_curve(spec: Spec, tmp_path: Path) -> None:
    for start, values in ((0, [0.5, 0.25, 0.125]), (2, [0.75, 1.0])):
        with Reporter(is_first=True) as report:
            report.open_files(tmp_path)
            report.open_trackers(spec, tmp_path, {}, start)
            for step, value in enumerate(values, start + 1):
                report.log(step, {"eval/loss": value})
    assert curve(tmp_path, "eval/loss") == [(1, 0.5), (2, 0.25), (3, 0.75), (4, 1.0)]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # it is the writer's own thread
def test_a_full_disk_ends_the_curves_and_nothing_else(
    spec: Spec, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = {*threading.enumerate()}
    with Reporter(is_first=True) as report:
        report.open_trackers(spec, tmp_path, {}, 0)
        (writer,) = {*threading.enumerate()} - before
        with files_up_to(1 << 16):
            for step in range(4000):
                report.log(step, {"mem/peak_gib": 0.5})
    writer.join(timeout=10)  # pytest would blame the next test for an error that comes after the end of this one
    assert not writer.is_alive()
    assert caplog.text.count("TensorBoard: ") == 1
    assert "File too large; its curves end here, training goes on" in caplog.text
    assert len(curve(tmp_path, "mem/peak_gib")) > 10
