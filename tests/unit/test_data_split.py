"""Holding out and sampling: exact shares, no leak of equal texts, the same rows for the same seed and content."""

from collections import Counter

import pytest

from dist_finetune.data.split import hold_out, sample, text_key
from dist_finetune.errors import UserError

# 300 rows of class 0, 90 of class 1, 10 of class 2; every fifth text is repeated by the row after it.
LABELS = [0] * 300 + [1] * 90 + [2] * 10
TEXTS = [f"text {row - (row % 5 == 1)}" for row in range(400)]
KEYS = [text_key([text]) for text in TEXTS]


def test_a_tenth_of_every_class_and_no_shared_text() -> None:
    kept, held = hold_out(KEYS, LABELS, 0.1, seed=0)
    assert sorted(kept + held) == list(range(400))
    counts = Counter(LABELS[row] for row in held)
    assert abs(counts[0] - 30) <= 1
    assert abs(counts[1] - 9) <= 1
    assert counts[2] in (1, 2)
    assert not {TEXTS[row] for row in held} & {TEXTS[row] for row in kept}


def test_the_split_is_of_seed_and_content_not_of_row_order() -> None:
    def held_texts(order: list[int], seed: int) -> set[str]:
        held = hold_out([KEYS[row] for row in order], [LABELS[row] for row in order], 0.1, seed)[1]
        return {TEXTS[order[row]] for row in held}

    forwards = list(range(400))
    assert held_texts(forwards, 0) == held_texts(forwards[::-1], 0)
    assert held_texts(forwards, 0) != held_texts(forwards, 1)


def test_known_rows_are_held_out() -> None:
    """Fixed numbers: no version of Python or code of ours may move a row of a run that is resumed."""
    keys = [text_key([str(i)]) for i in range(20)]
    assert hold_out(keys, [i % 2 for i in range(20)], 0.2, seed=7)[1] == [0, 2, 5, 13]


def test_lone_and_mostly_repeated_classes() -> None:
    keys = [text_key([text]) for text in ["lone", "a", "a", "a", "a", "a", "b", "c", "d"]]
    kept, held = hold_out(keys, [0] + [1] * 8, 0.1, seed=0)
    assert 0 in kept
    assert len(held) == 1
    assert held[0] >= 6
    with pytest.raises(UserError, match=r"data\.validation=0\.1.*two distinct rows"):
        hold_out(keys[1:6], [1] * 5, 0.1, seed=0)


def test_a_sample_keeps_every_class_and_its_share() -> None:
    chosen = sample(KEYS, LABELS, 40, seed=0)
    assert chosen == sorted(set(chosen))
    assert Counter(LABELS[row] for row in chosen) == {0: 30, 1: 9, 2: 1}
    assert chosen != sample(KEYS, LABELS, 40, seed=1)
    assert sample(KEYS, LABELS, 3, seed=0)
    assert sample(KEYS, LABELS, 1000, seed=0) == list(range(400))
    with pytest.raises(UserError, match=r"max_rows=2.*3 classes"):
        sample(KEYS, LABELS, 2, seed=0)


@pytest.mark.parametrize("num_rows", range(3, 400, 7))
def test_a_sample_has_exactly_the_rows_asked_for(num_rows: int) -> None:
    chosen = sample(KEYS, LABELS, num_rows, seed=3)
    assert len(chosen) == num_rows
    assert len({LABELS[row] for row in chosen}) == 3


def test_keys_are_equal_for_like_texts_only() -> None:
    assert text_key(["Caf\u00e9  Noir\n"]) == text_key([" cafe\u0301 noir"])
    assert text_key(["a", "b c"]) != text_key(["a b", "c"])
