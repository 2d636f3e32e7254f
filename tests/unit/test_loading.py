"""Batches that a thread makes ahead: the same ones in the same order, and no thread that is left."""

import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from dist_finetune.data.loading import Rows, ahead
from dist_finetune.signals import SIGNALS, StopSignals


def batches(made: list[int], number: int = 20, fails_at: int | None = None) -> Iterator[dict[str, Any]]:
    for i in range(number):
        if i == fails_at:
            raise ValueError("row 7 is damaged")
        made.append(i)
        yield {"inputs": i}


def making() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "batches"]


def until(condition: Any) -> None:
    end_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.01)


def test_batches_come_in_order_and_some_are_ready_before_they_are_asked_for() -> None:
    made: list[int] = []
    got = ahead(batches(made), num_ahead=3)
    assert next(got) == {"inputs": 0}
    until(lambda: len(made) >= 4)
    assert len(made) <= 5  # one taken, three waiting, one in the making
    assert [batch["inputs"] for batch in got] == list(range(1, 20))
    until(lambda: not making())


def test_an_error_comes_out_where_the_batch_is_asked_for() -> None:
    got = ahead(batches([], fails_at=2))
    assert [next(got)["inputs"], next(got)["inputs"]] == [0, 1]
    with pytest.raises(ValueError, match="row 7 is damaged"):
        next(got)
    until(lambda: not making())


def test_the_thread_ends_with_who_stops_early() -> None:
    made: list[int] = []
    got = ahead(batches(made, number=1000), num_ahead=2)
    next(got)
    got.close()  # type: ignore[attr-defined]
    until(lambda: not making())
    assert len(made) < 10


def test_a_loader_draws_nothing_from_the_numbers_of_the_model() -> None:
    rows = Rows([1, 2, 3], lambda numbers: {"inputs": numbers}, None)  # type: ignore[arg-type]
    before = torch.get_rng_state()
    assert [batch["inputs"] for batch in rows.batches_of([[0, 1], [2]])] == [[1, 2], [3]]
    assert torch.equal(torch.get_rng_state(), before)


class ToldToStop:
    """Rows whose loader process gets signals, as from a launcher that signals all processes of a rank."""

    def __getitem__(self, key: int) -> int:
        for number in SIGNALS:
            os.kill(os.getpid(), number)
        return os.getpid()


def test_a_signal_to_a_loader_process_is_not_taken_for_one_to_its_rank() -> None:
    """Nor does it end the process: the rank may be saving, and need its batches until it is told itself."""
    with StopSignals() as signals:
        rows = Rows(ToldToStop(), list, None, num_workers=1)  # type: ignore[arg-type]
        (one,), (other,) = rows.batches_of([[0], [1]])
        time.sleep(0.2)
        assert one == other != os.getpid()
        assert signals.first is None
