"""Whose turn it is to fill an entry: one job's at a time, and never that of a job that is gone."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dist_finetune import turns
from dist_finetune.cache.entries import make_room
from dist_finetune.turns import Queue, Turn


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_one_of_many_gets_the_turn_and_the_next_after_it_gave_up(tmp_path: Path) -> None:
    entry = tmp_path / "abc"
    for number in range(3):
        with ThreadPoolExecutor(8) as pool:
            taken = [turn for turn in pool.map(lambda _: Queue(entry).take(), range(8)) if turn]
        (turn,) = taken
        assert turn.path.name == f".abc.turn-{number}"
        assert not turn.is_lost
        assert Queue(entry).take() is None
        turn.end(is_done=False)
    last = Queue(entry).take()
    assert last
    last.end(is_done=True)
    assert files(tmp_path) == []


def test_files_of_another_user_are_in_nobodys_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder with the sticky bit only their owner can remove them."""
    (tmp_path / f".{'a' * 20}.turn-0").write_text(turns.GIVEN_UP)
    os.utime(tmp_path / f".{'a' * 20}.turn-0", (0, 0))
    turn = Queue(tmp_path / ("a" * 20)).take()
    assert turn
    unlink = Path.unlink

    def theirs(path: Path, missing_ok: bool = False) -> None:
        if path.name.endswith("turn-0"):
            raise PermissionError("Operation not permitted")
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", theirs)
    turn.end(is_done=True)
    make_room(tmp_path, 1, 2)
    assert files(tmp_path) == [f".{'a' * 20}.turn-0"]


def test_the_turn_of_a_process_that_was_killed_is_free_at_once(tmp_path: Path) -> None:
    program = (
        "import os, pathlib, sys; from dist_finetune.turns import Queue; "
        "Queue(pathlib.Path(sys.argv[1])).take(); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "abc")], check=False, timeout=60)
    assert done.returncode == -9
    assert files(tmp_path) == [".abc.turn-0"]
    turn = Queue(tmp_path / "abc").take()
    assert turn
    assert turn.path.name == ".abc.turn-1"
    turn.end(is_done=True)


def test_a_job_elsewhere_counts_as_gone_once_nothing_touches_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "STALE_S", 0.3)
    path = tmp_path / ".abc.turn-4"
    path.write_text(json.dumps({"host": "another machine", "pid": 1, "started": "1"}))
    queue, beats = Queue(tmp_path / "abc"), 0
    while beats < 6:  # as long as it is touched, whatever its clock says
        os.utime(path, (beats, beats))
        beats += 1
        assert queue.take() is None
        turns.time.sleep(0.1)
    turn = None
    for _ in range(100):
        turn = turn or queue.take()
        turns.time.sleep(0.01)
    assert turn
    assert turn.path.name == ".abc.turn-5"
    turn.end(is_done=False)


def test_a_job_that_wakes_up_after_it_was_taken_for_gone_knows(tmp_path: Path) -> None:
    mine = Queue(tmp_path / "abc").take()
    assert mine
    (tmp_path / ".abc.turn-1").write_text("{}")  # of another machine, for which this one was gone
    assert mine.is_lost
    (tmp_path / ".abc.turn-1").unlink()
    mine.end(is_done=True)
    assert Turn(tmp_path / ".abc.turn-0").is_lost  # the entry is there, no turn is any more


def test_a_turn_is_touched_while_its_job_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "BEAT_S", 0.05)
    turn = Queue(tmp_path / "abc").take()
    assert turn
    os.utime(turn.path, (0, 0))
    for _ in range(100):
        turns.time.sleep(0.02)
        if turn.path.stat().st_mtime:
            break
    assert turn.path.stat().st_mtime > 0
    turn.end(is_done=True)
