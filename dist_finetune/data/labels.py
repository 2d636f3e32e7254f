"""Labels of every task as read from a table: checked, named, and in the form that the rows of a run have.

A row's label is a tuple of class names (one for a classification, one a word for tags, any number for multilabel), or a
number for a regression.
"""

import math
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
from datasets import ClassLabel, Dataset, LargeList, List, Value

from dist_finetune.data.arrow import column_values
from dist_finetune.data.columns import Columns
from dist_finetune.data.sources import MAX_PLACES, Source
from dist_finetune.errors import UserError
from dist_finetune.tasks.names import TaskName

MAX_UNPROVEN_CLASSES = 20  # more classes than this, and more than half of the rows, is an id or a text, not a label
YES, NO = {"1", "true", "yes"}, {"0", "false", "no"}

# What an output stands for, and the fewest that make sense.
_OUTPUTS: dict[TaskName, tuple[str, str, int]] = {
    "classification": ("class", "two classes", 2),
    "multilabel": ("label", "one label", 1),
    "token-classification": ("tag", "two tags", 2),
}

Names = tuple[str, ...]


@dataclass(frozen=True)
class Labels:
    """The label of every row of a split, None where it is missing; of class labels, the names that are declared in
    order; and what is wrong with single rows, by what to say of them."""

    rows: list[Names | float | None]
    declared: Names | None = None
    wrong: dict[str, list[int]] = field(default_factory=dict)

    def names(self) -> Iterator[tuple[int, str]]:
        """Every class name with its row's number."""
        return ((i, name) for i, row in enumerate(self.rows) if isinstance(row, tuple) for name in row)


def read_labels(source: Source, columns: Columns) -> Labels:
    """The labels of a split for the task of `columns`. Raises UserError for a column that can't be a label of it."""
    return _READERS[columns.task](source, columns)


def class_names(labels: Labels, source: Source, columns: Columns) -> Names:
    """What a model's outputs stand for: the classes of the training rows (in a ClassLabel's order, else sorted, as
    numbers where all are whole numbers), or the label column of a regression.

    Raises UserError for fewer than two classes, or so many that the column can't be a label.
    """
    if columns.task == "regression" or len(columns.label) > 1:
        return columns.label
    found = {name for _, name in labels.names()}
    what, plural, least = _OUTPUTS[columns.task]
    if len(found) < least:
        only = f"one {what} only, {min(found)!r}" if found else "no labels"
        raise UserError(
            f"{source.names}: column {columns.label_in_words} holds {only}; {columns.task} needs {plural} at least"
        )
    are_numbers = all(re.fullmatch(r"-?\d+", name) for name in found)
    if columns.task == "classification" and len(found) > max(MAX_UNPROVEN_CLASSES, len(labels.rows) // 2):
        regression = " If they are numbers to be predicted, write task: regression." if are_numbers else ""
        used = (*columns.inputs, *columns.label)
        others = ", ".join(name for name in source.table.column_names if name not in used)
        way = f"Write data.label=COLUMN; other columns: {others}" if others else "No other column could be one"
        raise UserError(
            f"{source.names}: column {columns.label_in_words} has {len(found)} different values in "
            f"{len(labels.rows)} rows: no class label.{regression} {way}"
        )
    if labels.declared is not None:
        return tuple(name for name in labels.declared if name in found)
    if are_numbers:
        return tuple(sorted(found, key=lambda name: (int(name), name)))
    return tuple(sorted(found))


def label_notes(classes: Names, columns: Columns, asked: TaskName | None) -> tuple[str, ...]:
    """What was chosen where a label column could have meant another task."""
    if asked is not None:
        return ()
    label = ", ".join(columns.label)
    if columns.task == "regression":
        return (f"data.label={label} holds real numbers: task: regression was chosen",)
    are_numbers = all(re.fullmatch(r"-?\d+", name) for name in classes)
    if columns.task == "classification" and len(classes) > MAX_UNPROVEN_CLASSES and are_numbers:
        return (
            f"data.label={label} holds {len(classes)} different whole numbers: they were taken as classes; task: "
            "regression would predict them as numbers",
        )
    return ()


def label_problems(labels: Labels, source: Source, columns: Columns, classes: Names) -> list[str]:
    """A line for each way in which rows have no label or a wrong one, and a line for classes that training lacks."""
    problems = []
    column = f"column {columns.label_in_words}"
    missing = [row for row, label in enumerate(labels.rows) if label is None]
    if len(missing) == len(labels.rows):
        problems.append(f"{source.names}: no row has a label in {column}; is this an unlabelled test split?")
    elif missing:
        problems.append(f"label missing ({column}): {source.places(missing)}; fill it in or remove the rows")
    problems += [f"{what}: {source.places(rows)}" for what, rows in labels.wrong.items()]
    known = set(classes)
    unknown: dict[str, int] = {}
    for row, name in labels.names():
        if name not in known:
            unknown.setdefault(name, row)
    if unknown:
        shown = ", ".join(
            f"{name!r} (first at {source.places([row])})" for name, row in list(unknown.items())[:MAX_PLACES]
        )
        more = f" and {len(unknown) - MAX_PLACES} more" if len(unknown) > MAX_PLACES else ""
        valid = ", ".join(classes[:20]) + (", ..." if len(classes) > 20 else "")
        problems.append(f"classes that the training rows lack: {shown}{more}. Training has: {valid}")
    return problems


def label_cells(labels: Labels, task: TaskName, classes: Names) -> pa.Array:
    """Checked labels as a table holds them: a class's index, a number, or a list of indices."""
    if task == "regression":
        return pa.array(labels.rows, pa.float64())
    number = {name: i for i, name in enumerate(classes)}
    indices = [[number[name] for name in row] if isinstance(row, tuple) else None for row in labels.rows]
    if task == "classification":
        return pa.array([row[0] if row else None for row in indices], pa.int64())
    return pa.array(indices, pa.list_(pa.int64()))


def strata(labels: Labels, task: TaskName, classes: Names) -> list[int]:
    """The class of each row, by which a split is held out in its shares; one for all rows of other tasks."""
    if task != "classification":
        return [0] * len(labels.rows)
    cells: list[int] = label_cells(labels, task, classes).to_pylist()
    return cells


def label_bytes(labels: Labels, task: TaskName) -> list[bytes]:
    """Each row's label as bytes that no other label has, for a fingerprint."""
    if task == "regression":
        return [struct.pack("<d", row) for row in labels.rows]
    encoded: dict[str, bytes] = {}
    for _, name in labels.names():
        if name not in encoded:
            encoded[name] = len(name.encode()).to_bytes(4, "little") + name.encode()
    rows = [row for row in labels.rows if isinstance(row, tuple)]
    counts = [b"" if task == "classification" else len(row).to_bytes(4, "little") for row in rows]
    return [count + b"".join(encoded[name] for name in row) for count, row in zip(counts, rows, strict=True)]


def with_stand_ins(columns: Columns, table: Dataset) -> pa.Array:
    """Labels for rows that have none: the number of each word in its row, and 0 elsewhere."""
    if columns.task != "token-classification":
        return pa.array([0] * len(table), pa.int64())
    counts = [len(cell or ()) for cell in column_values(table, columns.text[0])]
    return pa.array([list(range(count)) for count in counts], pa.list_(pa.int64()))


def _read_classes(source: Source, columns: Columns) -> Labels:
    """Labels of any kind as class names: text as it is, 1 and 1.0 as "1", a ClassLabel's number as its name."""
    (column,) = columns.label
    feature, values = source.table.features[column], column_values(source.table, column)
    if not isinstance(feature, ClassLabel | Value):
        raise UserError(
            f"{source.names}: column {column!r} holds {type(feature).__name__}; a label is one text or number a row"
        )
    declared = _declared(feature)
    for row, value in enumerate(values):
        if isinstance(value, float) and math.isfinite(value) and not value.is_integer():
            raise UserError(f"{source.places([row])}: label {value} is a fraction; a class is a name or a whole number")
    names = [_name(value, declared) for value in values]
    return Labels([None if name is None else (name,) for name in names], declared)


def _read_label_lists(source: Source, columns: Columns) -> Labels:
    if len(columns.label) > 1:
        return _read_label_columns(source, columns)
    (column,) = columns.label
    values, declared = _lists(source, column, "multilabel")
    rows: list[Names | float | None] = []
    empty, repeated = [], []
    for i, cell in enumerate(values):
        names = [_name(value, declared) for value in cell or ()]
        if None in names:
            empty.append(i)
        elif len(set(names)) < len(names):
            repeated.append(i)
        rows.append(None if cell is None else tuple(dict.fromkeys(name for name in names if name is not None)))
    repeats = f"a label twice in one row (column {column!r}; for 0 and 1 in each place, make columns of them)"
    return Labels(rows, declared, _wrong({f"an empty label in the list (column {column!r})": empty, repeats: repeated}))


def _read_label_columns(source: Source, columns: Columns) -> Labels:
    """Several columns of 0 and 1: a row's labels are the columns that say 1."""
    marks: list[list[str]] = []
    wrong: dict[str, list[int]] = {}
    missing: set[int] = set()
    for column in columns.label:
        cells = ["" if v is None else str(_name(v, None) or "").lower() for v in column_values(source.table, column)]
        missing |= {i for i, cell in enumerate(cells) if cell == ""}
        odd = [i for i, cell in enumerate(cells) if cell and cell not in YES | NO]
        if odd:
            wrong[f"column {column!r} holds {cells[odd[0]]!r:.60} where one of several data.label has 0 or 1"] = odd
        marks.append(cells)
    rows: list[Names | float | None] = []
    for i in range(len(source.table)):
        named = tuple(name for name, cells in zip(columns.label, marks, strict=True) if cells[i] in YES)
        rows.append(None if i in missing else named)
    return Labels(rows, columns.label, wrong)


def _read_numbers(source: Source, columns: Columns) -> Labels:
    (column,) = columns.label
    rows: list[Names | float | None] = []
    no_number, not_finite = [], []
    for i, value in enumerate(column_values(source.table, column)):
        is_empty = value is None or (isinstance(value, str) and not value.strip())
        try:
            number = None if is_empty else float(value)
        except (TypeError, ValueError):
            no_number.append(i)
            number = 0.0
        if number is not None and not math.isfinite(number):
            not_finite.append(i)
        rows.append(number)
    wrong = {f"no number (column {column!r})": no_number, f"no finite number (column {column!r})": not_finite}
    return Labels(rows, None, _wrong(wrong))


def _read_tags(source: Source, columns: Columns) -> Labels:
    (column,), (words,) = columns.label, columns.text
    values, declared = _lists(source, column, "token-classification")
    counts = [None if cell is None else len(cell) for cell in column_values(source.table, words)]
    rows: list[Names | float | None] = []
    untagged, uneven = [], []
    for i, cell in enumerate(values):
        names = [_name(value, declared) for value in cell or ()]
        if None in names:
            untagged.append(i)
        if cell is not None and counts[i] not in (None, len(cell)):
            uneven.append(i)
        rows.append(None if cell is None else tuple(name for name in names if name is not None))
    first = f", {counts[uneven[0]]} words and {len(values[uneven[0]])} tags" if uneven else ""
    uneven_words = f"not as many tags as words (columns {words!r} and {column!r}{first})"
    return Labels(rows, declared, _wrong({f"a word without a tag (column {column!r})": untagged, uneven_words: uneven}))


def _lists(source: Source, column: str, task: TaskName) -> tuple[list[Any], Names | None]:
    feature = source.table.features[column]
    if not isinstance(feature, List | LargeList):
        raise UserError(f"{source.names}: column {column!r} holds {feature}; task: {task} needs a list in each row")
    return column_values(source.table, column), _declared(feature.feature)


def _declared(feature: Any) -> Names | None:
    return tuple(feature.names) if isinstance(feature, ClassLabel) else None


def _name(value: Any, declared: Names | None) -> str | None:
    """A class's name; None for what stands for no class. Hub data sets mark rows whose label is secret with -1."""
    if declared is not None:
        return declared[value] if value is not None and 0 <= value < len(declared) else None
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        value = int(value) if value.is_integer() else value
    return None if value is None or str(value).strip() == "" else str(value)


def _wrong(found: dict[str, list[int]]) -> dict[str, list[int]]:
    return {what: rows for what, rows in found.items() if rows}


_READERS: dict[TaskName, Callable[[Source, Columns], Labels]] = {
    "classification": _read_classes,
    "multilabel": _read_label_lists,
    "regression": _read_numbers,
    "token-classification": _read_tags,
}
