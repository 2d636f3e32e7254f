"""One local data file as an Arrow table: .csv .tsv .json .jsonl .parquet .arrow. Nothing is cached, nothing is guessed.

Delimited files are read as text: an empty cell is empty, and words such as "null" or "NA" stay words. Errors count data
rows from 1, the header aside.
"""

import csv
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from dist_finetune.errors import UserError, did_you_mean

DELIMITERS = {".csv": ",", ".tsv": "\t"}
SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".arrow")
MAX_FIELD_CHARS = 2**31 - 1  # the csv module stops at 131,072, which a long document passes

# A field that either has no quote at its start, or is quoted throughout with inner quotes doubled.
_FIELD = re.compile(r'(?!")[^\t]*|"(?:[^"]|"")*"')


def read_file(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """The file's rows; `columns` names those of a .csv or .tsv file without a header line.

    Raises UserError for a suffix that isn't known, an empty file, and a malformed row (named).
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(f"{path}: can't read files of kind {suffix or 'no suffix'!r}. Valid: {', '.join(SUFFIXES)}.")
    if columns and suffix not in DELIMITERS:
        raise UserError(
            f"{path}: data.columns names the columns of .csv and .tsv files; {suffix} files have their own names"
        )
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty")
    try:
        if suffix in DELIMITERS:
            return _read_delimited(path, DELIMITERS[suffix], columns)
        if suffix in (".json", ".jsonl"):
            return _read_json(path)
        return _read_parquet(path) if suffix == ".parquet" else _read_arrow(path)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8 text; save the file as UTF-8") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: not a readable {suffix} file: {str(error).splitlines()[0]}") from None


def _read_delimited(path: Path, delimiter: str, columns: Sequence[str] | None) -> pa.Table:
    text = path.read_bytes().decode("utf-8-sig")
    if delimiter == "," or _quotes_are_consistent(text):
        rows = _quoted_rows(path, text, delimiter)
    else:
        # Bare quotes, as in `"The Office" is back<TAB>1`: read as quoting, they would swallow whole lines.
        rows = (line.removesuffix("\r").split(delimiter) for line in text.split("\n"))
    return _rectangular(path, delimiter, rows, columns)


def _quotes_are_consistent(text: str) -> bool:
    """Whether every tab-separated field of every line that opens with a quote is a properly quoted one."""
    if '"' not in text:
        return False  # plain splitting gives the same, several times faster
    lines = (line.removesuffix("\r") for line in text.split("\n"))
    return all(_FIELD.fullmatch(field) for line in lines if '"' in line for field in line.split("\t"))


def _quoted_rows(path: Path, text: str, delimiter: str) -> Iterator[list[str]]:
    limit = csv.field_size_limit(MAX_FIELD_CHARS)
    # Lines keep their ends, so that a line break inside a quoted field comes through unchanged.
    reader = csv.reader(re.findall(r"[^\n]*\n|[^\n]+", text), delimiter=delimiter, strict=True)
    try:
        yield from reader
    except csv.Error as error:
        raise UserError(
            f"{path}:{reader.line_num}: malformed row: {error}. Quote a field that holds {delimiter!r}, a line break "
            'or a quote, and double the quotes inside it ("")'
        ) from None
    finally:
        csv.field_size_limit(limit)


def _rectangular(path: Path, delimiter: str, rows: Iterator[list[str]], columns: Sequence[str] | None) -> pa.Table:
    table = [row for row in rows if row and row != [""]]
    names = list(columns) if columns else (table.pop(0) if table else [])
    if not names or not table:
        raise UserError(f"{path}: no rows" + ("" if columns else " under the header line"))
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise UserError(f"{path}: two columns are called {repeated[0]!r}; the header has {', '.join(names)}")
    ragged = [(i, len(row)) for i, row in enumerate(table, 1) if len(row) != len(names)]
    if ragged:
        number, count = ragged[0]
        more = f" ({len(ragged)} such rows)" if len(ragged) > 1 else ""
        source = "data.columns" if columns else "the header"
        raise UserError(
            f"{path}: row {number} has {count} columns, {source} has {len(names)}{more}: {table[number - 1]!r:.200}. "
            f"{'A tab' if delimiter == chr(9) else 'A comma'} separates columns; a field that holds one must be quoted"
        )
    return pa.table([pa.array(column, pa.string()) for column in zip(*table, strict=True)], names=names)


def _read_json(path: Path) -> pa.Table:
    """One object a line, a list of objects, or an object of equally long columns."""
    text = path.read_bytes().decode("utf-8-sig")
    if not text.strip():
        raise UserError(f"{path}: no rows")
    if path.suffix.lower() == ".json":
        try:
            whole = json.loads(text)
        except json.JSONDecodeError as error:
            if error.msg != "Extra data" or error.lineno == 1:  # several objects are lines, which are tried below
                raise UserError(f"{path}:{error.lineno}:{error.colno}: not valid JSON: {error.msg}") from None
        else:
            if isinstance(whole, list):
                return _from_objects(path, whole)
            if isinstance(whole, dict) and whole and all(isinstance(column, list) for column in whole.values()):
                return _from_columns(path, whole)
            if "\n" in text.strip() or not isinstance(whole, dict):
                raise UserError(
                    f"{path}: neither a list of objects nor one of columns; write [{{...}}, ...] or one object a line"
                )
    objects = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                objects.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise UserError(f"{path}:{number}:{error.colno}: not valid JSON: {error.msg}: {line!r:.120}") from None
    return _from_objects(path, objects)


def _from_objects(path: Path, objects: Sequence[Any]) -> pa.Table:
    wrong = next((i for i, item in enumerate(objects, 1) if not isinstance(item, dict)), None)
    if wrong is not None:
        raise UserError(f"{path}: row {wrong} is not an object of columns: {objects[wrong - 1]!r:.120}")
    names = list(dict.fromkeys(name for item in objects for name in item))
    return _from_columns(path, {name: [item.get(name) for item in objects] for name in names})


def _from_columns(path: Path, columns: dict[str, list[Any]]) -> pa.Table:
    lengths = {name: len(column) for name, column in columns.items()}
    if not lengths or max(lengths.values()) == 0:
        raise UserError(f"{path}: no rows")
    if len(set(lengths.values())) > 1:
        raise UserError(f"{path}: columns of different lengths: {', '.join(f'{k} {v}' for k, v in lengths.items())}")
    return pa.table({name: _typed(path, name, column) for name, column in columns.items()})


def _typed(path: Path, name: str, column: list[Any]) -> pa.Array:
    try:
        return pa.array(column)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        first = next(value for value in column if value is not None)
        odd = next((i for i, v in enumerate(column, 1) if v is not None and type(v) is not type(first)), 1)
        raise UserError(
            f"{path}: column {name!r} mixes kinds of values: row {odd} holds {column[odd - 1]!r:.80}, "
            f"earlier rows such as {first!r:.80}"
        ) from None


def _read_parquet(path: Path) -> pa.Table:
    return _with_rows(path, pyarrow.parquet.read_table(path))


def _read_arrow(path: Path) -> pa.Table:
    """Both of Arrow's formats: the stream that `datasets` writes, and the random-access file."""
    source = pa.memory_map(str(path))
    try:
        table = pa.ipc.open_stream(source).read_all()
    except pa.ArrowInvalid:
        table = pa.ipc.open_file(source).read_all()
    return _with_rows(path, table)


def _with_rows(path: Path, table: pa.Table) -> pa.Table:
    if table.num_rows == 0:
        raise UserError(f"{path}: no rows")
    return table


def missing_path(path: Path, key: str) -> UserError:
    """The error for a path that isn't there, with the nearest names of the folder it should be in."""
    parent = path.parent
    while not parent.is_dir() and parent != parent.parent:
        parent = parent.parent
    names = sorted(item.name for item in parent.iterdir() if item.name[0] != ".") if parent.is_dir() else []
    lost = path.relative_to(parent).parts[0] if parent in path.parents else path.name
    return UserError(
        f"{key}: {path} does not exist (looked in {parent.resolve()}). {did_you_mean(lost, names)}".rstrip()
    )
