"""Holding rows out and sampling them: by hashes of seed and content, so the same rows on every machine and version.

Rows of the same text (up to case, spacing and Unicode form) or the same image share a key and stay on one side.
"""

import hashlib
import unicodedata
from collections import defaultdict
from collections.abc import Sequence

from dist_finetune.errors import UserError


def text_key(texts: Sequence[str]) -> bytes:
    """16 bytes that are equal for texts that differ in case, spacing or Unicode form alone."""
    plain = "\0".join(" ".join(unicodedata.normalize("NFKC", text).casefold().split()) for text in texts)
    return hashlib.blake2b(plain.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def hold_out(keys: Sequence[bytes], labels: Sequence[int], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Row numbers that stay and that are held out, each ascending: about `fraction` of every class, at least one row of
    each class that has two distinct contents.

    Rows of one key go together, counted to the class of the first of them. Raises UserError where none can be held out.
    """
    groups: dict[bytes, list[int]] = defaultdict(list)
    for row, key in enumerate(keys):
        groups[key].append(row)
    by_class: dict[int, list[bytes]] = defaultdict(list)
    for key, rows in groups.items():
        by_class[labels[rows[0]]].append(key)
    held: list[int] = []
    for class_keys in by_class.values():
        order = sorted(class_keys, key=lambda key: _draw(seed, key))
        num_rows = sum(len(groups[key]) for key in order)
        wanted = max(1, round(num_rows * fraction))
        taken: list[int] = []
        for key in order[:-1]:  # one group stays, whatever the fraction
            if len(taken) + len(groups[key]) / 2 > wanted:
                # Taking a large group of repeats would overshoot by more than leaving it out falls short.
                continue
            taken += groups[key]
            if len(taken) >= wanted:
                break
        held += taken or (groups[min(order[:-1], key=lambda key: len(groups[key]))] if len(order) > 1 else [])
    if not held:
        raise UserError(
            f"data.validation={fraction:g}: no class has two distinct rows, so none of {len(keys)} can be held out; "
            "give more rows, or a file as data.validation"
        )
    is_held = set(held)
    return [row for row in range(len(keys)) if row not in is_held], sorted(held)


def sample(keys: Sequence[bytes], labels: Sequence[int], num_rows: int, seed: int) -> list[int]:
    """`num_rows` row numbers, ascending, with every class in its share of all rows and none left out.

    Raises UserError where there are more classes than `num_rows`.
    """
    by_class: dict[int, list[int]] = defaultdict(list)
    for row, label in enumerate(labels):
        by_class[label].append(row)
    if num_rows >= len(labels):
        return list(range(len(labels)))
    if num_rows < len(by_class):
        raise UserError(
            f"data.max_rows={num_rows}: fewer rows than the {len(by_class)} classes; take at least one of each"
        )
    shares = _shares({label: len(rows) for label, rows in by_class.items()}, num_rows)
    chosen: list[int] = []
    for label, rows in by_class.items():
        order = sorted(rows, key=lambda row: _draw(seed, keys[row] + row.to_bytes(8, "little")))
        chosen += order[: shares[label]]
    return sorted(chosen)


def _shares(sizes: dict[int, int], total: int) -> dict[int, int]:
    """`total` dealt over classes in proportion to their sizes, one at least each; the largest remainders round up."""
    num_rows = sum(sizes.values())
    shares = {label: max(1, size * total // num_rows) for label, size in sizes.items()}
    # The remainder is negative for a class that the minimum of one lifted above its share.
    order = sorted(sizes, key=lambda label: (shares[label] - sizes[label] * total / num_rows, label))
    while sum(shares.values()) < total:
        for label in order:
            if sum(shares.values()) < total and shares[label] < sizes[label]:
                shares[label] += 1
    while sum(shares.values()) > total:
        largest = max(shares, key=lambda label: (shares[label], label))
        shares[largest] -= 1
    return shares


def _draw(seed: int, content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=8, key=seed.to_bytes(8, "little")).digest()
