"""Which tests stay together, and which come first, where tests/run.sh runs those of several processes two at a time.
And no test leaves signals blocked."""

import gc
import signal
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

import pytest

SHARED = {
    "test_export_reload.py": "matrix",
    "test_frozen.py": "matrix",
    "test_inference.py": "matrix",
    "test_same_numbers.py": "matrix",
    "test_plan_exactness.py": "matrix",
    "test_launchers_agree.py": "launchers",
    "test_launch_table.py": "launchers",
}
"""Files that look at the same runs. The tests of any other file are a group of their own: they share fixtures too."""
LONG = ("test_invariance.py", "matrix", "test_resume.py", "test_stopping.py", "test_cluster.py", "launchers")
"""Groups that start first, so that no core is idle at the end."""


def group_of(path: str) -> str:
    name = PurePath(path).name
    return SHARED.get(name, name)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    groups = [*LONG, *sorted({group_of(str(item.path)) for item in items} - set(LONG))]
    items.sort(key=lambda item: groups.index(group_of(str(item.path))))  # stable: within a group nothing moves


def pytest_collection_finish() -> None:
    gc.freeze()  # what was imported stays, and takes half a second of every collection that ends a training


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--dist loadfile`, tests of one group one after the other on one worker."""
    from xdist.scheduler import LoadFileScheduling

    class ByGroup(LoadFileScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid.partition("::")[0])

    return ByGroup(config, log) if config.getvalue("dist") == "loadfile" else None


@pytest.fixture(autouse=True)
def _signals_stay_as_they_were() -> Iterator[None]:
    """A signal that a test leaves blocked stays blocked in every process that later tests start: none would hear it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    yield
    after = signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert after == before, f"left blocked: {after - before}"
