"""Entities in tagged sentences: spans by their BIO tags, or single words where tags have no such prefixes."""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

OUTSIDE = "O"
_PREFIXED = re.compile(r"[BIESLU]-.+")  # BIO (IOB2), and its kin BIOES and BILOU
_STARTS, _GOES_ON, _ENDS = "BSU", "IEL", "ESLU"

Span = tuple[int, int, str]
"""First word, the word after the last, and kind."""


@dataclass
class SpanCounts:
    """Of one kind of entity: how many were `called` so, how many are `true`, and how many of both agree exactly."""

    right: int = 0
    called: int = 0
    true: int = 0


def has_spans(classes: Sequence[str]) -> bool:
    """True where the tags mark spans: all but "O" have a prefix such as "B-"."""
    inside = [name for name in classes if name != OUTSIDE]
    return bool(inside) and all(_PREFIXED.fullmatch(name) for name in inside)


def count_spans(
    predicted: Sequence[int], labels: Sequence[int], rows: Sequence[int], classes: Sequence[str]
) -> dict[str, SpanCounts]:
    """Entities by kind, in predicted and true tags (numbers of `classes`) of words whose sentences are `rows`.

    An entity is right where first word, last word and kind agree. Tags without prefixes make every word that isn't "O"
    an entity of its own.
    """
    find = _spans if has_spans(classes) else _words
    found: dict[str, SpanCounts] = defaultdict(SpanCounts)
    called, true = (set(find([classes[i] for i in tags], rows)) for tags in (predicted, labels))
    for _, _, kind in called:
        found[kind].called += 1
    for _, _, kind in true:
        found[kind].true += 1
    for _, _, kind in called & true:
        found[kind].right += 1
    return dict(sorted(found.items()))


def _words(tags: Sequence[str], rows: Sequence[int]) -> Iterator[Span]:
    return ((i, i + 1, tag) for i, tag in enumerate(tags) if tag != OUTSIDE)


def _spans(tags: Sequence[str], rows: Sequence[int]) -> Iterator[Span]:
    """As conlleval reads them: an "I-" with no entity of its kind before it, or one that has ended, starts one too."""
    start, kind, before = 0, "", ""
    for i, tag in enumerate(tags):
        prefix, _, name = tag.partition("-")
        is_open = bool(kind) and before not in _ENDS
        is_same = is_open and prefix in _GOES_ON and name == kind and rows[i] == rows[i - 1]
        before = prefix
        if kind and not is_same:
            yield start, i, kind
            kind = ""
        if not is_same and prefix in _STARTS + _GOES_ON:
            start, kind = i, name
    if kind:
        yield start, len(tags), kind
