"""From the data section of a spec to checked training, validation and test tables of one shape."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import pyarrow as pa
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature

from dist_finetune.data.arrow import arrow_column, in_memory, select
from dist_finetune.data.checks import ImageCheck, check_images, image_problems, read_texts, read_words
from dist_finetune.data.columns import Columns, find_columns
from dist_finetune.data.files import DELIMITERS
from dist_finetune.data.label_kind import is_list, is_string
from dist_finetune.data.labels import (
    Labels,
    class_names,
    label_bytes,
    label_cells,
    label_notes,
    label_problems,
    read_labels,
    strata,
    with_stand_ins,
)
from dist_finetune.data.sources import Source, key_of, paths_as_images, read_source
from dist_finetune.data.split import hold_out, sample, text_key
from dist_finetune.errors import UserError, did_you_mean, nearest
from dist_finetune.spec import DataSpec
from dist_finetune.tasks.names import TaskName


@dataclass(frozen=True)
class Tables:
    """Checked rows: columns "text" (and "text_pair"), "words" or "image", and "label", an index into `classes`, a list
    of indices, or a number.

    `fingerprint` is a sha256 over texts, or image files' bytes, and labels by name of all splits in order: equal for
    equal content whatever the path, file kind or machine. `notes` are findings that stop nothing but that a user should
    see.
    """

    train: Dataset
    validation: Dataset
    test: Dataset | None
    classes: tuple[str, ...]
    """What each output of a model stands for: a class, a label, a tag, or the label column of a regression."""
    columns: Columns
    fingerprint: str
    notes: tuple[str, ...] = ()

    @property
    def splits(self) -> dict[str, Dataset]:
        """The table of each split that is there, by name."""
        found = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: table for name, table in found.items() if table is not None}

    @property
    def modality(self) -> Literal["text", "image"]:
        return self.columns.modality

    @property
    def task(self) -> TaskName:
        return self.columns.task


@dataclass(frozen=True)
class _Rows:
    """A split under way: its table, and per row a key (equal for like content), a digest (of the exact content), its
    stratum and its label as bytes."""

    table: Dataset
    keys: Sequence[bytes]
    digests: Sequence[bytes]
    strata: Sequence[int] = ()
    labels: Sequence[bytes] = ()

    def select(self, rows: Sequence[int]) -> "_Rows":
        return _Rows(
            table=select(self.table, rows),
            keys=[self.keys[row] for row in rows],
            digests=[self.digests[row] for row in rows],
            strata=[self.strata[row] for row in rows],
            labels=[self.labels[row] for row in rows],
        )


@dataclass(frozen=True)
class OpenTables:
    """The splits of a spec as they were read: columns, labels and classes are found, rows are not checked yet."""

    sources: dict[str, Source]
    columns: Columns
    labels: dict[str, Labels]
    classes: tuple[str, ...]

    def check_images(self, decode: bool, first: int = 0, step: int = 1) -> dict[str, list[ImageCheck]] | None:
        """Those of every `step`th image of each split; None for data without images."""
        column = self.columns.image
        if column is None:
            return None
        return {role: check_images(source, column, decode, first, step) for role, source in self.sources.items()}


def read_tables(spec: DataSpec, seed: int, decode_images: bool = True, task: TaskName | None = None) -> Tables:
    """The splits that `spec` names: read, columns and (where not given) task found, checked, held out and sampled by
    `seed`.

    `decode_images=False` leaves out the proof that every image file decodes. Raises UserError that lists all problems
    of the rows of all splits. The ranks of a job share the work, see `together.py`.
    """
    opened = open_tables(spec, task)
    return checked_tables(opened, opened.check_images(decode_images), spec, seed, task)


def open_tables(spec: DataSpec, task: TaskName | None) -> OpenTables:
    """The sources that `spec` names, with columns, labels and classes found."""
    sources = _read_sources(spec)
    columns = find_columns(sources["train"].table, spec, sources["train"].names, task)
    _refuse_without_effect(spec, columns)
    _require_columns(sources, columns)
    labels = {role: read_labels(source, columns) for role, source in sources.items()}
    classes = class_names(labels["train"], sources["train"], columns)
    return OpenTables({role: _with_images(s, columns) for role, s in sources.items()}, columns, labels, classes)


def checked_tables(
    opened: OpenTables,
    images: dict[str, list[ImageCheck]] | None,
    spec: DataSpec,
    seed: int,
    task: TaskName | None,
) -> Tables:
    """The splits, of which `images` are the checks of all images."""
    columns, classes = opened.columns, opened.classes
    splits: dict[str, _Rows] = {}
    problems: list[str] = []
    for role, source in opened.sources.items():
        rows, found = _check_rows(source, opened.labels[role], columns, classes, images[role] if images else ())
        problems += [f"data.{role}: {line}" for line in found]
        splits[role] = rows
    if problems:
        raise UserError("\n".join(problems))
    if isinstance(spec.validation, float):
        kept, held = hold_out(splits["train"].keys, splits["train"].strata, spec.validation, seed)
        splits["train"], splits["validation"] = splits["train"].select(kept), splits["train"].select(held)
    if spec.max_rows is not None:
        train = splits["train"]
        splits["train"] = train.select(sample(train.keys, train.strata, spec.max_rows, seed))
    return Tables(
        train=splits["train"].table,
        validation=splits["validation"].table,
        test=splits["test"].table if "test" in splits else None,
        classes=classes,
        columns=columns,
        fingerprint=_fingerprint(splits, columns.task),
        notes=(*label_notes(classes, columns, task), *_overlaps(splits)),
    )


def read_table(
    items: Sequence[str], role: str, header: Sequence[str] | None, columns: Columns, classes: tuple[str, ...]
) -> Dataset:
    """One more split in the shape of those of `Tables`, with the columns and classes of a run that has been.

    `header` names the columns of .csv and .tsv files without a header line. Raises UserError that lists all problems of
    the rows, such as a label that is none of `classes`.
    """
    source = read_source(items, role, header)
    _require_columns({role: source}, columns)
    labels, source = read_labels(source, columns), _with_images(source, columns)
    rows, problems = _check_rows(source, labels, columns, classes, _all_images(source, columns))
    if problems:
        raise UserError("\n".join(f"{key_of(role)}: {line}" for line in problems))
    return rows.table


def unlabelled_table(source: Source, role: str, columns: Columns) -> Dataset:
    """The inputs of `source` in the shape of `Tables`, whether it has labels or not: see `with_stand_ins`."""
    _require_columns({role: source}, columns, labelled=False)
    source = _with_images(source, columns)
    rows, problems = _read_inputs(source, columns, _all_images(source, columns))
    if problems:
        raise UserError("\n".join(f"{key_of(role)}: {line}" for line in problems))
    return _labelled(rows.table, with_stand_ins(columns, source.table))


def _read_sources(spec: DataSpec) -> dict[str, Source]:
    items = {"train": spec.train, "validation": spec.validation, "test": spec.test}
    named = {role: names for role, names in items.items() if isinstance(names, tuple)}
    if spec.columns and not any(name.lower().endswith(tuple(DELIMITERS)) for names in named.values() for name in names):
        raise UserError(
            "data.columns names the columns of .csv and .tsv files without a header line; no such file is read"
        )
    return {role: read_source(names, role, spec.columns) for role, names in named.items()}


def _refuse_without_effect(spec: DataSpec, columns: Columns) -> None:
    """A setting for the other kind of data would be ignored without a word."""
    unused = {"text": spec.text, "max_length": spec.max_length}
    if columns.modality == "text":
        unused = {"image_size": spec.image_size, "augment": spec.augment or None}
    wrong = [f"data.{name}" for name, value in unused.items() if value is not None]
    if wrong:
        what = "text" if columns.modality == "text" else "images"
        raise UserError(
            f"{' and '.join(wrong)}: without effect, as the rows are {what} (column {columns.inputs[0]!r}); leave out"
        )


def _require_columns(sources: dict[str, Source], columns: Columns, labelled: bool = True) -> None:
    names = (*columns.inputs, *columns.label) if labelled else columns.inputs
    are_words = columns.task == "token-classification"
    problems = []
    for role, source in sources.items():
        there = source.table.column_names
        for name in names:
            if name not in there:
                guess = did_you_mean(name, there) + " " if nearest(name, there) else ""
                problems.append(
                    f"{key_of(role)}: {source.names} lacks the column {name!r} of the training rows. {guess}"
                    f"Columns: {', '.join(there)}."
                )
            elif name in columns.text and not (
                is_list(source.table, name, of_text=True) if are_words else is_string(source.table, name)
            ):
                what = "a list of words in each row" if are_words else "text"
                problems.append(
                    f"{key_of(role)}: {source.names}: column {name!r} holds {source.table.features[name]}, not {what}"
                )
    if problems:
        raise UserError("\n".join(problems))


def _check_rows(
    source: Source, labels: Labels, columns: Columns, classes: tuple[str, ...], images: Sequence[ImageCheck]
) -> tuple[_Rows, list[str]]:
    """The split in its common shape, and what is wrong with its rows; with problems, rows are not complete."""
    problems = label_problems(labels, source, columns, classes)
    rows, found = _read_inputs(source, columns, images)
    if problems or found:
        return rows, problems + found
    return (
        replace(
            rows,
            table=_labelled(rows.table, label_cells(labels, columns.task, classes)),
            strata=strata(labels, columns.task, classes),
            labels=label_bytes(labels, columns.task),
        ),
        [],
    )


def _with_images(source: Source, columns: Columns) -> Source:
    """The source with its column of image paths, where it has one, as images."""
    if columns.image is None or isinstance(source.table.features[columns.image], ImageFeature):
        return source
    return replace(source, table=paths_as_images(source, columns.image))


def _all_images(source: Source, columns: Columns) -> Sequence[ImageCheck]:
    return check_images(source, columns.image, decode=True) if columns.image is not None else ()


def _read_inputs(source: Source, columns: Columns, images: Sequence[ImageCheck]) -> tuple[_Rows, list[str]]:
    """The inputs of a split without labels, and what is wrong with them."""
    if columns.image is not None:
        digests, problems = [digest for digest, _ in images], image_problems(images, source, columns.image)
        cells = arrow_column(source.table, columns.image)
        table = in_memory(pa.table({"image": cells}), Features({"image": ImageFeature()}))
        return _Rows(table, digests, digests), problems
    names: tuple[str, ...]
    inputs: list[list[Any]]
    rows: list[Sequence[str]]
    if columns.task == "token-classification":
        words, problems = read_words(source, columns.text[0])
        names, inputs, rows, kind = ("words",), [words], list(words), pa.list_(pa.string())
    else:
        texts, problems = read_texts(source, columns.text)
        names, inputs, kind = ("text", "text_pair")[: len(texts)], [*texts], pa.string()
        rows = list(zip(*texts, strict=True))
    if problems:
        return _Rows(source.table, [], []), problems
    table = in_memory(pa.table({n: pa.array(column, kind) for n, column in zip(names, inputs, strict=True)}))
    exact = [hashlib.blake2b("\0".join(row).encode("utf-8", "surrogatepass"), digest_size=16).digest() for row in rows]
    return _Rows(table, [text_key(row) for row in rows], exact), []


def _labelled(table: Dataset, cells: pa.Array) -> Dataset:
    """The table with its column "label"."""
    kind = {pa.int64(): Value("int64"), pa.float64(): Value("float64")}.get(cells.type, List(Value("int64")))
    columns = {name: arrow_column(table, name) for name in table.column_names}
    return in_memory(pa.table({**columns, "label": cells}), Features({**table.features, "label": kind}))


def _overlaps(splits: dict[str, _Rows]) -> tuple[str, ...]:
    """A note for each split that repeats contents of the training rows: its score is partly memory."""
    seen = set(splits["train"].keys)
    counts = {role: sum(key in seen for key in rows.keys) for role, rows in splits.items() if role != "train"}
    return tuple(
        f"{count} of {len(splits[role].keys)} {role} rows repeat the content of a training row: the score is flattered"
        for role, count in counts.items()
        if count
    )


def _fingerprint(splits: dict[str, _Rows], task: TaskName) -> str:
    digest = hashlib.sha256(b"" if task == "classification" else f"{task}\n".encode())
    for role in sorted(splits):
        rows = splits[role]
        digest.update(f"{role} {len(rows.digests)}\n".encode())
        digest.update(b"".join(content + label for content, label in zip(rows.digests, rows.labels, strict=True)))
    return digest.hexdigest()
