"""Which columns hold text, image and label, and so the task: as the user says, else where one reading is possible."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, Value
from datasets import Image as ImageFeature

from dist_finetune.data.files import DELIMITERS
from dist_finetune.data.label_kind import (
    NEEDS,
    are_numbers,
    is_list,
    is_string,
    kind_of,
    probe,
    task_of_columns,
)
from dist_finetune.errors import UserError, did_you_mean
from dist_finetune.spec import DataSpec
from dist_finetune.tasks.names import TaskName

LABEL_NAMES = ("label", "labels")
WORD_NAMES = ("tokens", "words")
MAX_FOUND_CLASSES = 100  # a column of more values is a label only where the user says so


@dataclass(frozen=True)
class Columns:
    """The columns of the training table that a run uses, and the task that they are for.

    `text` is empty for images, `image` None for text; a column of words is `text` of a token classification.
    """

    modality: Literal["text", "image"]
    text: tuple[str, ...]
    image: str | None
    label: tuple[str, ...]
    task: TaskName = "classification"

    @property
    def inputs(self) -> tuple[str, ...]:
        """The text columns, or the image column."""
        return self.text if self.image is None else (self.image,)

    @property
    def label_in_words(self) -> str:
        """The label columns, for a message."""
        return ", ".join(map(repr, self.label))


def find_columns(table: Dataset, spec: DataSpec, where: str, task: TaskName | None = None) -> Columns:
    """The columns to use for `task` (None: found). Raises UserError that lists the table's columns when one is missing,
    several would do, or the task can't be made of them."""
    _refuse_unknown(table, spec, where)
    words = _find_words(table, spec, where, task)
    label = spec.label or (_find_label(table, spec, where, words, task),)
    if spec.label is None and spec.columns is None:
        _refuse_row_as_header(table, label[0], where)
    images = [n for n, f in table.features.items() if isinstance(f, ImageFeature) and n not in label]
    if spec.image is not None or (images and not spec.text):
        image = spec.image or _only(images, table, "image", where)
        return Columns("image", (), image, label, task_of_columns(table, label, None, task, where))
    if words is not None and (task == "token-classification" or all(is_list(table, name) for name in label)):
        return Columns("text", (words,), None, label, task_of_columns(table, label, words, task, where))
    text = tuple(spec.text or ()) or (_only(_text_candidates(table, label), table, "text", where),)
    if len(text) > 2:
        raise UserError(f"data.text: {len(text)} columns; one text or a pair of two can be encoded")
    if set(label) & set(text) or len(set(text)) < len(text):
        raise UserError(
            f"data.text={', '.join(text)} and data.label={', '.join(label)}: each role needs a column of its own"
        )
    for name in text:
        if not is_string(table, name):
            raise UserError(
                f"{where}: data.text={name}: the column holds {_kind(table, name)}, not text. {_listed(table)}"
            )
    return Columns("text", text, None, label, task_of_columns(table, label, None, task, where))


def _refuse_unknown(table: Dataset, spec: DataSpec, where: str) -> None:
    asked = [("text", name) for name in spec.text or ()] + [("image", spec.image)]
    asked += [("label", name) for name in spec.label or ()]
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
    if len(set(spec.label or ())) < len(spec.label or ()):
        raise UserError(f"data.label={', '.join(spec.label or ())}: the same column is named twice")


def _refuse_row_as_header(table: Dataset, label: str, where: str) -> None:
    """A file without a header line would lose its first row, unsaid. Its label then stands below as well."""
    names = table.column_names
    is_delimited = Path(where.split(", ")[0]).suffix.lower() in DELIMITERS
    are_numbers_of_columns = names == [str(i) for i in range(len(names))]  # as pandas writes columns without names
    if is_delimited and not are_numbers_of_columns and label in probe(table, label).to_pylist():
        roles = {label: "label", **dict.fromkeys(_text_candidates(table, (label,))[:1], "text")}
        wanted = ",".join(roles.get(name, f"column{i}") for i, name in enumerate(names, 1))
        raise UserError(
            f"{where}: the first line is read as the names of columns, but {label!r} is also a value below it. If the "
            f"line is a row, name the columns: data.columns=[{wanted}]; if not, write data.label={label!r}"
        )


def _find_words(table: Dataset, spec: DataSpec, where: str, task: TaskName | None) -> str | None:
    """The column that holds a list of words in each row; None where there is none, or where it can't be meant.

    Raises UserError where `task` needs one.
    """
    if task not in (None, "token-classification"):
        return None
    names = list(spec.text) if spec.text else [n for n in table.column_names if n not in (spec.label or ())]
    found = [name for name in names if is_list(table, name, of_text=True)]
    named = [name for name in found if name.lower() in WORD_NAMES]
    if len(named) == 1 and not spec.text:
        return named[0]
    if spec.text and len(found) == 1 and len(spec.text) == 1:
        return found[0]
    if task is None:
        return None
    what = f"{' and '.join(found)} could each be the words; write data.text=COLUMN" if found else "no column of words"
    raise UserError(f"{where}: {what}. task: token-classification needs {NEEDS[task]}. {_listed(table)}")


def _find_label(table: Dataset, spec: DataSpec, where: str, words: str | None, task: TaskName | None) -> str:
    used = {*(spec.text or ()), spec.image, words}
    rest = [name for name in table.column_names if name not in used]
    ways: dict[str, Callable[[str], bool]] = {
        "named": lambda name: name.lower() in LABEL_NAMES,
        "typed": lambda name: isinstance(table.features[name], ClassLabel),
        "lists": lambda name: is_list(table, name),
        "few": lambda name: _has_few_values(table, name),
        "real": lambda name: kind_of(table, name) == "real numbers",
    }
    order = ["named", "typed", "few", "lists", "real"] if words is None else ["named", "lists", "typed", "few", "real"]
    if task in ("multilabel", "token-classification"):
        order = ["named", "lists"]
    elif task == "regression":
        order = ["named", "real"]
    for way in order:
        found = [name for name in rest if ways[way](name)]
        if len(found) == 1:
            return found[0]
        if len(found) > 1:
            break
    several = f"{' and '.join(found)} could each be the label" if found else "no column looks like a label"
    needs = f" task: {task} needs {NEEDS[task]}." if task else ""
    raise UserError(f"{where}: {several}; write data.label=COLUMN.{needs} {_listed(table)}")


def _text_candidates(table: Dataset, label: tuple[str, ...]) -> list[str]:
    """String columns besides the label that aren't numbers: cells of a .csv file are all strings."""
    names = [name for name in table.column_names if name not in label and is_string(table, name)]
    return [name for name in names if not _is_numeric(table, name)]


def _only(found: list[str], table: Dataset, role: str, where: str) -> str:
    if len(found) == 1:
        return found[0]
    reason = f"{' and '.join(found)} could each be the {role}" if found else f"no column holds {role}"
    pair = f", or data.text=[{found[0]},{found[1]}] for a pair" if role == "text" and len(found) > 1 else ""
    raise UserError(f"{where}: {reason}; write data.{role}=COLUMN{pair}. {_listed(table)}")


def _listed(table: Dataset) -> str:
    names = table.column_names
    other = next((mark for mark in ";\t|," if mark in names[0]), None) if len(names) == 1 else None
    split = f" Are they separated by {other!r}? A .csv file needs commas, a .tsv file tabs." if other else ""
    return "Columns: " + ", ".join(f"{name} ({_kind(table, name)})" for name in names) + f".{split}"


def _kind(table: Dataset, name: str) -> str:
    feature = table.features[name]
    if isinstance(feature, Value):
        return "numbers as text" if is_string(table, name) and _is_numeric(table, name) else str(feature.dtype)
    return "list" if is_list(table, name) else type(feature).__name__


def _is_numeric(table: Dataset, name: str) -> bool:
    return are_numbers(probe(table, name).to_pylist())


def _has_few_values(table: Dataset, name: str) -> bool:
    feature = table.features[name]
    if not isinstance(feature, Value) or not (
        is_string(table, name) or feature.dtype.startswith(("int", "uint", "bool"))
    ):
        return False
    cells = probe(table, name)
    num_values = len(pc.unique(cells))
    return 2 <= num_values <= min(MAX_FOUND_CLASSES, len(cells) // 2)
