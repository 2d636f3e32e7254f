"""Rows checked before anything is trained on them: labels, texts, image files. Their problems are told all at once."""

import hashlib
import math
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Value
from datasets import Image as ImageFeature
from PIL import Image, UnidentifiedImageError

from dist_finetune.data.arrow import column_values
from dist_finetune.data.sources import MAX_PLACES, Source
from dist_finetune.errors import UserError, did_you_mean

MAX_UNPROVEN_CLASSES = 20  # more classes than this, and more than half of the rows, is an id or a text, not a label


@dataclass(frozen=True)
class Labels:
    """The class name of every row of a split (None where missing) and, of a ClassLabel column, its names in order."""

    names: list[str | None]
    declared: tuple[str, ...] | None


def read_labels(source: Source, column: str) -> Labels:
    """Labels of any kind as class names: text as it is, 1 and 1.0 as "1", a ClassLabel's number as its name.

    Raises UserError for fractions and lists, which are no classes.
    """
    feature = source.table.features[column]
    values = column_values(source.table, column)
    if isinstance(feature, ClassLabel):
        # Hub data sets mark rows whose label is kept secret with -1.
        declared = tuple(feature.names)
        return Labels([declared[v] if v is not None and 0 <= v < len(declared) else None for v in values], declared)
    if not isinstance(feature, Value):
        raise UserError(
            f"{source.names}: column {column!r} holds {type(feature).__name__}; a label is one text or number a row"
        )
    names: list[str | None] = []
    for row, value in enumerate(values):
        if isinstance(value, float) and math.isfinite(value) and not value.is_integer():
            raise UserError(f"{source.places([row])}: label {value} is a fraction; a class is a name or a whole number")
        if isinstance(value, float):
            value = int(value) if math.isfinite(value) else None
        names.append(None if value is None or str(value).strip() == "" else str(value))
    return Labels(names, None)


def class_names(labels: Labels, source: Source, column: str) -> tuple[str, ...]:
    """The classes of the training rows: in a ClassLabel's order, else sorted, as numbers where all are whole numbers.

    Raises UserError for fewer than two classes, or so many that the column can't be a label.
    """
    found = {name for name in labels.names if name is not None}
    if len(found) < 2:
        only = f"one class only, {min(found)!r}" if found else "no labels"
        raise UserError(f"{source.names}: column {column!r} holds {only}; classification needs two classes at least")
    if len(found) > max(MAX_UNPROVEN_CLASSES, len(labels.names) // 2):
        raise UserError(
            f"{source.names}: column {column!r} has {len(found)} different values in {len(labels.names)} rows: "
            f"no class label. {did_you_mean('label', source.table.column_names)} Write data.label=COLUMN"
        )
    if labels.declared is not None:
        return tuple(name for name in labels.declared if name in found)
    if all(re.fullmatch(r"-?\d+", name) for name in found):
        return tuple(sorted(found, key=lambda name: (int(name), name)))
    return tuple(sorted(found))


def label_problems(labels: Labels, source: Source, column: str, classes: Sequence[str]) -> list[str]:
    """A line for rows without a label, and a line for classes that training lacks."""
    problems = []
    missing = [row for row, name in enumerate(labels.names) if name is None]
    if len(missing) == len(labels.names):
        problems.append(f"{source.names}: no row has a label in column {column!r}; is this an unlabelled test split?")
    elif missing:
        problems.append(f"label missing (column {column!r}): {source.places(missing)}; fill it in or remove the rows")
    known = set(classes)
    unknown: dict[str, int] = {}
    for row, name in enumerate(labels.names):
        if name is not None and name not in known:
            unknown.setdefault(name, row)
    if unknown:
        shown = ", ".join(
            f"{name!r} (first at {source.places([row])})" for name, row in list(unknown.items())[:MAX_PLACES]
        )
        more = f" and {len(unknown) - MAX_PLACES} more" if len(unknown) > MAX_PLACES else ""
        valid = ", ".join(classes[:20]) + (", ..." if len(classes) > 20 else "")
        problems.append(f"classes that the training rows lack: {shown}{more}. Training has: {valid}")
    return problems


def read_texts(source: Source, columns: Sequence[str]) -> tuple[list[list[str]], list[str]]:
    """The texts of each column, and a line for each column that has empty ones."""
    texts: list[list[str]] = []
    problems = []
    for column in columns:
        cells = column_values(source.table, column)
        empty = [row for row, cell in enumerate(cells) if cell is None or not cell.strip()]
        if empty:
            problems.append(f"empty text (column {column!r}): {source.places(empty)}; fill it in or remove the rows")
        texts.append(cells)
    return texts, problems


def check_images(source: Source, column: str, decode: bool) -> tuple[list[bytes], list[str]]:
    """A digest of each image file's bytes, and lines that name the missing, truncated and non-image ones.

    With `decode` every image is really decoded: JPEG at an eighth of its size, which still reads all of its data but
    costs far less. Without, files are read only.
    """
    images = source.table.select_columns(column).cast_column(column, ImageFeature(decode=False)).with_format(None)

    def check(row: int) -> tuple[bytes, str | None]:
        return _check_image(images[row][column], decode)

    with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as threads:
        results = list(threads.map(check, range(len(images))))
    broken = [(row, reason) for row, (_, reason) in enumerate(results) if reason is not None]
    problems = [f"{_image_name(images[row][column], source, row)}: {reason}" for row, reason in broken[:MAX_PLACES]]
    if len(broken) > MAX_PLACES:
        problems.append(f"and {len(broken) - MAX_PLACES} more damaged images of {source.names}")
    return [digest for digest, _ in results], problems


def _check_image(image: Mapping[str, Any] | None, decode: bool) -> tuple[bytes, str | None]:
    if image is None or (image["bytes"] is None and not image["path"]):
        return b"", "no image in this row"
    try:
        content = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
        if decode:
            with Image.open(BytesIO(content)) as opened:
                opened.draft("L", (1, 1))
                opened.load()
    except UnidentifiedImageError:
        return b"", "not an image file; remove or replace it" if content else "an empty file; remove or replace it"
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            return b"", f"can't be read: {error.strerror}"
        return b"", f"a damaged image file ({error}); remove or replace it"
    return hashlib.blake2b(content, digest_size=16).digest(), None


def _image_name(image: Mapping[str, Any] | None, source: Source, row: int) -> str:
    path = image["path"] if image is not None and image["bytes"] is None else None
    return path or source.places([row])
