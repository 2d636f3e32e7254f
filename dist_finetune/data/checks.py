"""Inputs checked before anything is trained on them: texts, words, image files. Their problems are told all at once."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image, UnidentifiedImageError

from dist_finetune.data.arrow import column_values
from dist_finetune.data.sources import MAX_PLACES, Source

ImageCheck = tuple[bytes, str | None]
"""A digest of an image file's bytes, and what is wrong with it, None for nothing."""


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


def read_words(source: Source, column: str) -> tuple[list[list[str]], list[str]]:
    """The words of each row, and lines for rows without any and for empty words."""
    cells = column_values(source.table, column)
    none = [row for row, cell in enumerate(cells) if not cell]
    empty = [row for row, cell in enumerate(cells) if any(word is None or not word.strip() for word in cell or ())]
    problems = [
        f"{what} (column {column!r}): {source.places(rows)}; {remedy}"
        for what, rows, remedy in (
            ("no words", none, "fill them in or remove the rows"),
            ("an empty word", empty, "remove it and its tag"),
        )
        if rows
    ]
    return cells, problems


def check_images(source: Source, column: str, decode: bool, first: int = 0, step: int = 1) -> list[ImageCheck]:
    """Every `step`th image from the `first` on: a digest of its file's bytes, and what is wrong with it where it is
    missing, truncated or no image.

    With `decode` every image is really decoded: JPEG at an eighth of its size, which still reads all of its data but
    costs far less. Without, files are read only.
    """
    images = _undecoded(source, column)

    def check(row: int) -> ImageCheck:
        return _check_image(images[row][column], decode)

    with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as threads:
        return list(threads.map(check, range(first, len(images), step)))


def image_problems(checks: Sequence[ImageCheck], source: Source, column: str) -> list[str]:
    """Lines that name what is wrong with images, for checks of all of them."""
    broken = [(row, reason) for row, (_, reason) in enumerate(checks) if reason is not None]
    if not broken:
        return []
    images = _undecoded(source, column)
    problems = [f"{_image_name(images[row][column], source, row)}: {reason}" for row, reason in broken[:MAX_PLACES]]
    if len(broken) > MAX_PLACES:
        problems.append(f"and {len(broken) - MAX_PLACES} more damaged images of {source.names}")
    return problems


def _undecoded(source: Source, column: str) -> Dataset:
    return source.table.select_columns(column).cast_column(column, ImageFeature(decode=False)).with_format(None)


def _check_image(image: Mapping[str, Any] | None, decode: bool) -> ImageCheck:
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
