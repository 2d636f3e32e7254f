"""What a label column holds, told from its cells, and the tasks that can be made of it."""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import pyarrow as pa
from datasets import ClassLabel, Dataset, LargeList, List, Value

from dist_finetune.data.arrow import arrow_column
from dist_finetune.errors import UserError
from dist_finetune.tasks.names import TASKS, TaskName

PROBE_ROWS = 50_000  # rows that show what a column holds
MOST = 0.5

LabelKind = Literal["text", "class names", "whole numbers", "real numbers", "lists", "something else"]
FITTING: dict[LabelKind, tuple[TaskName, ...]] = {
    "text": ("classification",),
    "class names": ("classification",),
    "whole numbers": ("classification", "regression"),
    "real numbers": ("regression",),
    "lists": ("multilabel", "token-classification"),
    "something else": (),
}
"""The tasks that each kind of column can be; the first is taken where the user names none."""
NEEDS: dict[TaskName, str] = {
    "classification": "one class a row, a text or a whole number",
    "multilabel": "a list of labels in each row, or several columns of 0 and 1: data.label=[A,B]",
    "regression": "one number a row",
    "token-classification": "a list of words and a list of as many tags in each row of a .jsonl, .parquet or .arrow "
    'file, such as {"tokens": ["In", "Oslo"], "tags": ["O", "B-place"]}, or a .conll file',
}

_NUMBER = re.compile(r"\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*")
_NOT_FINITE = re.compile(r"\s*(nan|[-+]?inf(inity)?)\s*", re.IGNORECASE)


def is_string(table: Dataset, name: str) -> bool:
    """Whether a column holds text, of any Arrow kind of string."""
    return _is_text(table.features[name])


def is_list(table: Dataset, name: str, of_text: bool = False) -> bool:
    """Whether each cell of a column is a list, with `of_text` a list of texts."""
    feature = table.features[name]
    if not isinstance(feature, List | LargeList):
        return False
    return not of_text or _is_text(feature.feature)


def _is_text(feature: Any) -> bool:
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string", "string_view")


def probe(table: Dataset, name: str) -> pa.ChunkedArray:
    """The first rows of one column, without decoding anything."""
    return arrow_column(table.select(range(min(len(table), PROBE_ROWS))), name)


def are_numbers(cells: Iterable[str | None], share: float = 1.0) -> bool:
    """Whether texts, or such a share of them, are numbers, empty ones and "nan" aside; a .csv file has texts only."""
    filled = [cell for cell in cells if cell and cell.strip() and not _NOT_FINITE.fullmatch(cell)]
    numbers = sum(_NUMBER.fullmatch(cell) is not None for cell in filled)
    return numbers > 0 and numbers >= share * len(filled)


def kind_of(table: Dataset, name: str) -> LabelKind:
    """What the column `name` holds."""
    feature = table.features[name]
    if isinstance(feature, ClassLabel):
        return "class names"
    if is_list(table, name):
        return "lists"
    if is_string(table, name):
        cells = probe(table, name).to_pylist()
        return _kind_of_numbers(float(c) for c in cells if c and c.strip()) if are_numbers(cells) else "text"
    if not isinstance(feature, Value):
        return "something else"
    if feature.dtype.startswith(("float", "decimal")):
        return _kind_of_numbers(float(c) for c in probe(table, name).to_pylist() if c is not None)
    return "whole numbers" if feature.dtype.startswith(("int", "uint", "bool")) else "text"  # such as dates


def task_of_columns(
    table: Dataset, labels: Sequence[str], words: str | None, asked: TaskName | None, where: str
) -> TaskName:
    """The task that a table is for, from its label columns and, where it has one, its column of word lists.

    Raises UserError where `asked` can't be, with what was found and what would work.
    """
    if len(labels) > 1:
        if asked not in (None, "multilabel"):
            raise UserError(
                f"data.label names {len(labels)} columns, and task: {asked} has one label column; several columns of "
                "0 and 1 are task: multilabel"
            )
        return "multilabel"
    (label,) = labels
    kind = kind_of(table, label)
    fitting = list(FITTING[kind])
    if kind == "real numbers" and is_string(table, label):
        fitting.append("classification")  # names such as "1.5", where the user says that they are
    if kind == "text" and asked == "regression" and are_numbers(probe(table, label).to_pylist(), MOST):
        fitting.append("regression")  # the rows that hold something else are then named
    if kind == "lists":
        fitting.remove("multilabel" if words is not None else "token-classification")
    if asked in fitting:
        return asked
    if asked is None and fitting:
        return fitting[0]
    first = next((cell for cell in probe(table, label).to_pylist() if cell is not None), None)
    found = f"{where}: column {label!r} holds {_in_words(kind, first)}"
    works = f" With this column {' or '.join(f'task: {t}' for t in fitting)} would work." if fitting else ""
    if asked is None:
        listed = "; ".join(f"{task}: {NEEDS[task]}" for task in TASKS)
        raise UserError(f"{found}, which is no label of any task. {listed}")
    raise UserError(f"{found}; task: {asked} needs {NEEDS[asked]}.{works}")


def _kind_of_numbers(values: Iterable[float]) -> LabelKind:
    return "whole numbers" if all(v.is_integer() for v in values if math.isfinite(v)) else "real numbers"


def _in_words(kind: LabelKind, first: Any) -> str:
    example = f" such as {first!r:.60}" if first is not None else ""
    return {"something else": "no values that can be labels", "text": "texts"}.get(kind, kind) + example
