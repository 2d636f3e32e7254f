"""Which samples make a step: the same at every world size, each once, in windows whose parts add up."""

from collections import Counter
from itertools import pairwise, product

import numpy as np
import pytest

from dist_finetune.data.batches import (
    LENGTH_WINDOW,
    StepBatch,
    cut_rows,
    deal,
    evaluation_batches,
    global_batches,
    training_steps,
)

SIZES = list(product((1, 5, 16, 37, 151), (4, 16), (1, 2, 4)))
"""Rows, global batch size, world size."""


def lengths_of(num_rows: int) -> np.ndarray:
    return np.random.default_rng(3).integers(1, 60, num_rows).astype(np.int32)


def real_rows(step: StepBatch) -> list[int]:
    return [int(i) for micro in step.micro_batches if not micro.is_filler for i in micro.ids]


@pytest.mark.parametrize("by_length", [False, True])
@pytest.mark.parametrize(("num_rows", "global_batch_size", "world_size"), SIZES)
def test_steps_are_the_global_batches_dealt_to_ranks(
    num_rows: int, global_batch_size: int, world_size: int, by_length: bool
) -> None:
    lengths = lengths_of(num_rows) if by_length else None
    steps_per_epoch = -(-num_rows // global_batch_size)
    total, micro = 2 * steps_per_epoch + 1, max(1, global_batch_size // world_size // 2)
    ranks = [
        list(training_steps(num_rows, global_batch_size, micro, total, 5, rank, world_size, lengths))
        for rank in range(world_size)
    ]
    assert [len(steps) for steps in ranks] == [total] * world_size
    for s, steps in enumerate(zip(*ranks, strict=True)):
        batch = global_batches(num_rows, global_batch_size, 5, s // steps_per_epoch, lengths)[s % steps_per_epoch]
        rows = [row for step in steps for row in real_rows(step)]
        assert sorted(rows) == sorted(batch.tolist())  # the union over ranks, each row once
        assert {(step.step, step.epoch, step.num_samples) for step in steps} == {(s, s // steps_per_epoch, len(batch))}
        assert len({len(step.micro_batches) for step in steps}) == 1  # collectives stay in step
        assert all(0 < len(m.ids) <= micro for step in steps for m in step.micro_batches)


@pytest.mark.parametrize("by_length", [False, True])
@pytest.mark.parametrize(("num_rows", "global_batch_size"), [(1, 4), (37, 4), (151, 16), (700, 16)])
def test_an_epoch_has_each_row_once_and_another_order_each_time(
    num_rows: int, global_batch_size: int, by_length: bool
) -> None:
    lengths = lengths_of(num_rows) if by_length else None
    epochs = [np.concatenate(global_batches(num_rows, global_batch_size, 0, epoch, lengths)) for epoch in range(3)]
    other_seed = np.concatenate(global_batches(num_rows, global_batch_size, 1, 0, lengths))
    for order in (*epochs, other_seed):
        assert sorted(order.tolist()) == list(range(num_rows))
    if num_rows > 1:
        assert not any(np.array_equal(a, b) for a, b in pairwise([*epochs, other_seed]))
    again = np.concatenate(global_batches(num_rows, global_batch_size, 0, 1, lengths))
    assert np.array_equal(again, epochs[1])


def test_only_the_last_global_batch_is_short() -> None:
    sizes = [len(b) for b in global_batches(151, 16, 0, 0, lengths_of(151))]
    assert sizes == [16] * 9 + [7]


def test_rows_of_like_length_share_a_batch() -> None:
    """Padding is what a sort by length saves: well under half of what random batches need."""
    lengths = lengths_of(LENGTH_WINDOW * 16)

    def padding(batches: list[np.ndarray]) -> int:
        return sum(int((lengths[b].max() - lengths[b]).sum()) for b in batches)

    plain, sorted_ = (global_batches(len(lengths), 16, 0, 0, given) for given in (None, lengths))
    assert padding(sorted_) < 0.2 * padding(plain)
    firsts = [int(lengths[b[0]]) for b in sorted_]
    assert firsts != sorted(firsts)
    assert firsts != sorted(firsts, reverse=True)


@pytest.mark.parametrize("first_step", [1, 7, 10, 13, 19])
def test_steps_go_on_anywhere_as_if_never_stopped(first_step: int) -> None:
    arguments = (151, 16, 4, 20, 0, 1, 2, lengths_of(151))
    whole = list(training_steps(*arguments))
    rest = list(training_steps(*arguments, first_step=first_step))
    assert [s.step for s in rest] == list(range(first_step, 20))
    for a, b in zip(whole[first_step:], rest, strict=True):
        assert real_rows(a) == real_rows(b)
        assert (a.epoch, a.num_samples, a.ends_epoch) == (b.epoch, b.num_samples, b.ends_epoch)


def test_epochs_end_where_rows_do_and_at_the_last_step() -> None:
    steps = list(training_steps(151, 16, 4, 13, 0, 0, 1))
    assert [s.step for s in steps if s.ends_epoch] == [9, 12]


def test_a_rank_without_rows_gets_fillers() -> None:
    batch = np.array([8, 3, 5])
    dealt = [deal(batch, rank, 4, 2) for rank in range(4)]
    assert [[(m.ids.tolist(), m.is_filler) for m in micro] for micro in dealt] == [
        [([8], False)], [([3], False)], [([5], False)], [([8], True)],
    ]  # fmt: skip


@pytest.mark.parametrize("by_length", [False, True])
@pytest.mark.parametrize(("num_rows", "batch_size", "world_size"), SIZES)
def test_evaluation_has_each_row_once_and_ranks_in_step(
    num_rows: int, batch_size: int, world_size: int, by_length: bool
) -> None:
    lengths = lengths_of(num_rows) if by_length else None
    ranks = [evaluation_batches(num_rows, batch_size, rank, world_size, lengths) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    seen = Counter(int(i) for batches in ranks for batch in batches if not batch.is_filler for i in batch.ids)
    assert seen == Counter(range(num_rows))
    assert all(0 < len(batch.ids) <= batch_size for batches in ranks for batch in batches)


@pytest.mark.parametrize("num_tokens", [1, 64, 200, 10_000])
@pytest.mark.parametrize(("num_rows", "global_batch_size", "world_size"), SIZES)
def test_micro_batches_by_tokens_keep_global_batches_and_order(
    num_rows: int, global_batch_size: int, world_size: int, num_tokens: int
) -> None:
    lengths, total = lengths_of(num_rows), -(-num_rows // global_batch_size)
    ranks = [
        list(
            training_steps(
                num_rows, global_batch_size, 1, total, 5, rank, world_size, lengths, micro_batch_tokens=num_tokens
            )
        )
        for rank in range(world_size)
    ]
    whole = [
        list(training_steps(num_rows, global_batch_size, global_batch_size, total, 5, rank, world_size, lengths))
        for rank in range(world_size)
    ]
    for rank in range(world_size):
        assert [real_rows(step) for step in ranks[rank]] == [real_rows(step) for step in whole[rank]]
    for steps in zip(*ranks, strict=True):
        assert len({len(step.micro_batches) for step in steps}) == 1
        for micro in (m for step in steps for m in step.micro_batches):
            assert len(micro.ids) == 1 or len(micro.ids) * lengths[micro.ids].max() <= num_tokens
    if num_tokens == 10_000:
        assert {len(step.micro_batches) for step in ranks[0]} == {1}


def test_micro_batches_by_tokens_are_full() -> None:
    """Short rows go together, so that a pass has about as many tokens as the longest rows give it."""
    lengths = np.asarray([40, 40, 30, 30, 10, 10, 10, 10, 10, 10, 10, 10], np.int32)
    pieces = [m.ids.tolist() for m in deal(np.arange(12), 0, 1, 80, lengths)]
    assert pieces == [[0, 1], [2, 3], [4, 5, 6, 7, 8, 9, 10, 11]]
    assert [m.ids.tolist() for m in deal(np.arange(12), 1, 2, 80, lengths)] == [[1, 3], [5, 7, 9, 11]]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_batches_by_tokens_hold_each_row_once(world_size: int) -> None:
    lengths = lengths_of(151)
    ranks = [evaluation_batches(151, 16, rank, world_size, lengths, num_tokens=200) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    real = [m.ids for batches in ranks for m in batches if not m.is_filler]
    assert sorted(i for ids in real for i in ids.tolist()) == list(range(151))
    assert all(len(ids) <= 16 and len(ids) * lengths[ids].max() <= 200 for ids in real)
    by_rows = cut_rows(np.argsort(-lengths), 16)
    padded = [sum(len(ids) * int(lengths[ids].max()) for ids in batches) for batches in (real, by_rows)]
    assert padded[0] < padded[1]
    assert cut_rows(np.arange(0), 16, lengths, 200) == []
