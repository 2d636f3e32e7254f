"""Which columns hold text, image and label: as the user says, else found where only one reading is possible."""

import re
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, List, Value
from datasets import Image as ImageFeature

from dist_finetune.data.arrow import arrow_column
from dist_finetune.errors import UserError, did_you_mean
from dist_finetune.spec import DataSpec

LABEL_NAMES = ("label", "labels")
MAX_FOUND_CLASSES = 100  # a column of more values is a label only where the user says so
PROBE_ROWS = 50_000  # rows that show what a column holds


@dataclass(frozen=True)
class Columns:
    """The columns of the training table that a run uses; `text` is empty for images, `image` None for text."""

    modality: Literal["text", "image"]
    text: tuple[str, ...]
    image: str | None
    label: str

    @property
    def inputs(self) -> tuple[str, ...]:
        """The text columns, or the image column."""
        return self.text if self.image is None else (self.image,)


def find_columns(table: Dataset, spec: DataSpec, where: str) -> Columns:
    """The columns to use. Raises UserError that lists the table's columns when one is missing or several would do."""
    _refuse_unknown(table, spec, where)
    label = spec.label or _find_label(table, spec, where)
    images = [n for n, f in table.features.items() if isinstance(f, ImageFeature) and n != label]
    if spec.image is not None or (images and not spec.text):
        return Columns("image", (), spec.image or _only(images, table, "image", where), label)
    text = tuple(spec.text or ()) or (_only(_text_candidates(table, label), table, "text", where),)
    if len(text) > 2:
        raise UserError(f"data.text: {len(text)} columns; one text or a pair of two can be encoded")
    if label in text or len(set(text)) < len(text):
        raise UserError(f"data.text={', '.join(text)} and data.label={label}: each role needs a column of its own")
    for name in text:
        if not is_string(table, name):
            raise UserError(
                f"{where}: data.text={name}: the column holds {_kind(table, name)}, not text. {_listed(table)}"
            )
    return Columns("text", text, None, label)


def _refuse_unknown(table: Dataset, spec: DataSpec, where: str) -> None:
    asked = [("text", name) for name in spec.text or ()] + [("image", spec.image), ("label", spec.label)]
    wrong = [(role, name) for role, name in asked if name is not None and name not in table.column_names]
    if wrong:
        lines = [
            f"data.{role}={name}: {where} has no such column. {did_you_mean(name, table.column_names)}"
            for role, name in wrong
        ]
        raise UserError("\n".join([*lines, _listed(table)]))
    if spec.image and spec.text:
        raise UserError(
            f"data.image={spec.image} and data.text={', '.join(spec.text)}: a run takes text or images, not both"
        )


def _find_label(table: Dataset, spec: DataSpec, where: str) -> str:
    used = {*(spec.text or ()), spec.image}
    rest = [name for name in table.column_names if name not in used]
    named = [name for name in rest if name.lower() in LABEL_NAMES]
    typed = [name for name in rest if isinstance(table.features[name], ClassLabel)]
    for found in (named, typed, [name for name in rest if _has_few_values(table, name)]):
        if len(found) == 1:
            return found[0]
        if len(found) > 1:
            break
    several = f"{' and '.join(found)} could each be the label" if found else "no column looks like a label"
    raise UserError(f"{where}: {several}; write data.label=COLUMN. {_listed(table)}")


def _text_candidates(table: Dataset, label: str) -> list[str]:
    """String columns besides the label that aren't numbers: cells of a .csv file are all strings."""
    names = [name for name in table.column_names if name != label and is_string(table, name)]
    return [name for name in names if not _is_numeric(table, name)]


def _only(found: list[str], table: Dataset, role: str, where: str) -> str:
    if len(found) == 1:
        return found[0]
    reason = f"{' and '.join(found)} could each be the {role}" if found else f"no column holds {role}"
    pair = f", or data.text=[{found[0]},{found[1]}] for a pair" if role == "text" and len(found) > 1 else ""
    raise UserError(f"{where}: {reason}; write data.{role}=COLUMN{pair}. {_listed(table)}")


def _listed(table: Dataset) -> str:
    return "Columns: " + ", ".join(f"{name} ({_kind(table, name)})" for name in table.column_names) + "."


def _kind(table: Dataset, name: str) -> str:
    feature = table.features[name]
    if isinstance(feature, Value):
        return "numbers as text" if is_string(table, name) and _is_numeric(table, name) else str(feature.dtype)
    return "list" if isinstance(feature, (list, List)) else type(feature).__name__


def is_string(table: Dataset, name: str) -> bool:
    """Whether a column holds text, of any Arrow kind of string."""
    feature = table.features[name]
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string", "string_view")


def _probe(table: Dataset, name: str) -> pa.ChunkedArray:
    """The first rows of one column, without decoding anything."""
    return arrow_column(table.select(range(min(len(table), PROBE_ROWS))), name)


def _is_numeric(table: Dataset, name: str) -> bool:
    cells = _probe(table, name)
    filled = pc.filter(cells, pc.not_equal(pc.fill_null(cells, ""), ""))
    return len(filled) > 0 and all(
        re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", c) for c in filled.to_pylist()
    )


def _has_few_values(table: Dataset, name: str) -> bool:
    feature = table.features[name]
    if not isinstance(feature, Value) or not (
        is_string(table, name) or feature.dtype.startswith(("int", "uint", "bool"))
    ):
        return False
    cells = _probe(table, name)
    num_values = len(pc.unique(cells))
    return 2 <= num_values <= min(MAX_FOUND_CLASSES, len(cells) // 2)
