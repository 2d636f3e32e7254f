"""From the data section of a spec to checked training, validation and test tables of one shape."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import pyarrow as pa
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature

from dist_finetune.data.arrow import arrow_column, in_memory, select
from dist_finetune.data.checks import Labels, check_images, class_names, label_problems, read_labels, read_texts
from dist_finetune.data.columns import Columns, find_columns, is_string
from dist_finetune.data.files import DELIMITERS
from dist_finetune.data.sources import Source, key_of, paths_as_images, read_source
from dist_finetune.data.split import hold_out, sample, text_key
from dist_finetune.errors import UserError, did_you_mean
from dist_finetune.spec import DataSpec


@dataclass(frozen=True)
class Tables:
    """Checked rows: columns "text" (and "text_pair") or "image", and "label", an index into `classes`.

    `fingerprint` is a sha256 over texts, or image files' bytes, and class names of all splits in order: equal for equal
    content whatever the path, file kind or machine. `notes` are findings that stop nothing but that a user should see.
    """

    train: Dataset
    validation: Dataset
    test: Dataset | None
    classes: tuple[str, ...]
    modality: Literal["text", "image"]
    text_columns: tuple[str, ...]
    image_column: str | None
    label_column: str
    fingerprint: str
    notes: tuple[str, ...] = ()

    @property
    def splits(self) -> dict[str, Dataset]:
        """The table of each split that is there, by name."""
        found = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: table for name, table in found.items() if table is not None}


@dataclass(frozen=True)
class _Rows:
    """A split under way: its table, and per row a key (equal for like content) and a digest (of the exact content)."""

    table: Dataset
    keys: Sequence[bytes]
    digests: Sequence[bytes]
    labels: Sequence[int]

    def select(self, rows: Sequence[int]) -> "_Rows":
        return _Rows(
            table=select(self.table, rows),
            keys=[self.keys[row] for row in rows],
            digests=[self.digests[row] for row in rows],
            labels=[self.labels[row] for row in rows],
        )


def read_tables(spec: DataSpec, seed: int, decode_images: bool = True) -> Tables:
    """The splits that `spec` names: read, columns found, checked, held out and sampled by `seed`.

    `decode_images=False` leaves out the proof that every image file decodes (one rank is enough to give it); all
    else is the same on every rank. Raises UserError that lists all problems of the rows of all splits.
    """
    sources = _read_sources(spec)
    columns = find_columns(sources["train"].table, spec, sources["train"].names)
    _refuse_without_effect(spec, columns)
    _require_columns(sources, columns)
    labels = {role: read_labels(source, columns.label) for role, source in sources.items()}
    classes = class_names(labels["train"], sources["train"], columns.label)
    splits: dict[str, _Rows] = {}
    problems: list[str] = []
    for role, source in sources.items():
        rows, found = _check_rows(source, labels[role], columns, classes, decode_images)
        problems += [f"data.{role}: {line}" for line in found]
        splits[role] = rows
    if problems:
        raise UserError("\n".join(problems))
    if isinstance(spec.validation, float):
        kept, held = hold_out(splits["train"].keys, splits["train"].labels, spec.validation, seed)
        splits["train"], splits["validation"] = splits["train"].select(kept), splits["train"].select(held)
    if spec.max_rows is not None:
        train = splits["train"]
        splits["train"] = train.select(sample(train.keys, train.labels, spec.max_rows, seed))
    return Tables(
        train=splits["train"].table,
        validation=splits["validation"].table,
        test=splits["test"].table if "test" in splits else None,
        classes=classes,
        modality=columns.modality,
        text_columns=columns.text,
        image_column=columns.image,
        label_column=columns.label,
        fingerprint=_fingerprint(splits, classes),
        notes=_overlaps(splits),
    )


def read_table(
    items: Sequence[str], role: str, header: Sequence[str] | None, columns: Columns, classes: Sequence[str]
) -> Dataset:
    """One more split in the shape of those of `Tables`, with the columns and classes of a run that has been.

    `header` names the columns of .csv and .tsv files without a header line. Raises UserError that lists all problems of
    the rows, such as a label that is none of `classes`.
    """
    source = read_source(items, role, header)
    _require_columns({role: source}, columns)
    rows, problems = _check_rows(source, read_labels(source, columns.label), columns, classes, decode_images=True)
    if problems:
        raise UserError("\n".join(f"{key_of(role)}: {line}" for line in problems))
    return rows.table


def unlabelled_table(source: Source, role: str, columns: Columns) -> Dataset:
    """The inputs of `source` in the shape of `Tables`, whether it has labels or not: "label" is 0 in each row."""
    _require_columns({role: source}, columns, labelled=False)
    stand_in = Labels(["any"] * len(source.table), None)
    rows, problems = _check_rows(source, stand_in, columns, ("any",), decode_images=True)
    if problems:
        raise UserError("\n".join(f"{key_of(role)}: {line}" for line in problems))
    return rows.table


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
    names = (*columns.inputs, columns.label) if labelled else columns.inputs
    problems = []
    for role, source in sources.items():
        there = source.table.column_names
        for name in names:
            if name not in there:
                near = did_you_mean(name, there)
                problems.append(
                    f"{key_of(role)}: {source.names} lacks the column {name!r} of the training rows. {near} "
                    f"Columns: {', '.join(there)}."
                )
            elif name in columns.text and not is_string(source.table, name):
                problems.append(
                    f"{key_of(role)}: {source.names}: column {name!r} holds {source.table.features[name]}, not text"
                )
    if problems:
        raise UserError("\n".join(problems))


def _check_rows(
    source: Source, labels: Labels, columns: Columns, classes: Sequence[str], decode_images: bool
) -> tuple[_Rows, list[str]]:
    """The split in its common shape, and what is wrong with its rows; with problems, rows may hold stand-ins."""
    problems = label_problems(labels, source, columns.label, classes)
    number = {name: i for i, name in enumerate(classes)}
    indices = [number.get(name, -1) if name is not None else -1 for name in labels.names]
    label = pa.array(indices, pa.int64())
    if columns.image is not None:
        if not isinstance(source.table.features[columns.image], ImageFeature):
            source = replace(source, table=paths_as_images(source, columns.image))
        digests, found = check_images(source, columns.image, decode_images)
        cells = arrow_column(source.table, columns.image)
        features = Features({"image": ImageFeature(), "label": Value("int64")})
        table = in_memory(pa.table({"image": cells, "label": label}), features)
        return _Rows(table, digests, digests, indices), problems + found
    texts, found = read_texts(source, columns.text)
    if problems or found:
        return _Rows(source.table, [], [], []), problems + found
    names = ("text", "text_pair")[: len(texts)]
    table = in_memory(
        pa.table({**{n: pa.array(t, pa.string()) for n, t in zip(names, texts, strict=True)}, "label": label})
    )
    rows = list(zip(*texts, strict=True))
    exact = [hashlib.blake2b("\0".join(row).encode("utf-8", "surrogatepass"), digest_size=16).digest() for row in rows]
    return _Rows(table, [text_key(row) for row in rows], exact, indices), []


def _overlaps(splits: dict[str, _Rows]) -> tuple[str, ...]:
    """A note for each split that repeats contents of the training rows: its score is partly memory."""
    seen = set(splits["train"].keys)
    counts = {role: sum(key in seen for key in rows.keys) for role, rows in splits.items() if role != "train"}
    return tuple(
        f"{count} of {len(splits[role].keys)} {role} rows repeat the content of a training row: the score is flattered"
        for role, count in counts.items()
        if count
    )


def _fingerprint(splits: dict[str, _Rows], classes: Sequence[str]) -> str:
    digest = hashlib.sha256()
    names = [len(name.encode()).to_bytes(4, "little") + name.encode() for name in classes]
    for role in sorted(splits):
        rows = splits[role]
        digest.update(f"{role} {len(rows.digests)}\n".encode())
        digest.update(
            b"".join(content + names[label] for content, label in zip(rows.digests, rows.labels, strict=True))
        )
    return digest.hexdigest()
