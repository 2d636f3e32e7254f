"""How soon a wish to stop is known: at the next call where calls are long, and after a few where they are short."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_finetune.signals import SIGNALS, StopSignals
from dist_finetune.spec import LaunchSpec
from dist_finetune.stopping import ASK_EVERY_S, MOST_CALLS, Interrupted, StopWish
from dist_finetune.world import join_world


class Counted(StopWish):
    """Counts its questions."""

    num_asked = 0

    def _ask(self) -> None:
        self.num_asked += 1
        super()._ask()


@pytest.fixture
def stop(tmp_path: Path) -> Iterator[Counted]:
    with StopSignals() as signals, join_world(LaunchSpec()) as world:
        wish = Counted(world, signals, tmp_path, None, time.perf_counter(), None)
        yield wish
        wish.settle()


def calls_until_told(stop: StopWish, pause_s: float) -> int:
    """Calls after one that has just answered, until a signal that comes now is known."""
    stop._signals.first = SIGNALS[0]
    for number in range(1, 100):
        time.sleep(pause_s)
        try:
            stop.check()
        except Interrupted:
            return number
    pytest.fail("never told")


def test_short_calls_share_a_question(stop: Counted) -> None:
    for _ in range(400):
        stop.check()
    assert 400 / MOST_CALLS <= stop.num_asked < 400 / MOST_CALLS * 2
    assert calls_until_told(stop, 0) <= MOST_CALLS + 1


def test_long_calls_ask_each_time(stop: Counted) -> None:
    for _ in range(5):
        time.sleep(ASK_EVERY_S)
        stop.check()
    assert stop.num_asked == 5
    assert calls_until_told(stop, ASK_EVERY_S) == 2, "asked at one call, known at the next"


def test_a_new_pace_asks_at_once(stop: Counted) -> None:
    """After many short calls, the first long ones still ask each time."""
    for _ in range(100):
        stop.check()
    stop.new_pace()
    before = stop.num_asked
    for _ in range(3):
        stop.check()
        time.sleep(ASK_EVERY_S)
    assert stop.num_asked == before + 3
    stop.new_pace()
    assert calls_until_told(stop, ASK_EVERY_S) == 2
