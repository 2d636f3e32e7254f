"""One local data file as an Arrow table, told by its suffix. Nothing is cached, nothing is guessed.

Delimited files are read as text: an empty cell is empty, and words such as "null" or "NA" stay words. Errors count data
rows from 1, the header aside.
"""

import csv
import json
import os
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
from datasets import Features

from dist_finetune.data.conll import conll_sentences
from dist_finetune.errors import UserError, did_you_mean, nearest

DELIMITERS = {".csv": ",", ".tsv": "\t"}
SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".arrow", ".conll")
MAX_FIELD_CHARS = 2**31 - 1  # the csv module stops at 131,072, which a long document passes

# A field that either has no quote at its start, or is quoted throughout with inner quotes doubled.
_FIELD = re.compile(r'(?!")[^\t]*|"(?:[^"]|"")*"')


def read_file(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """The file's rows; `columns` names those of a .csv or .tsv file without a header line.

    Raises UserError for a suffix that isn't known, an empty file, and a malformed row (named).
    """
    return next(read_pieces(path, columns))


def read_pieces(path: Path, columns: Sequence[str] | None = None, num_rows: int | None = None) -> Iterator[pa.Table]:
    """As `read_file`, in tables of up to `num_rows` rows (None: one of all), each read when it is asked for.

    Only a .json file, which may be one list, is read as a whole all the same.
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
            yield from _delimited_pieces(path, DELIMITERS[suffix], columns, num_rows)
        elif suffix == ".jsonl":
            yield from _object_pieces(path, _objects(path, _lines(path)), num_rows)
        elif suffix == ".conll":
            yield from _object_pieces(path, conll_sentences(path, _lines(path)), num_rows)
        elif suffix == ".json":
            yield from _json_pieces(path, num_rows)
        else:
            for table in _parquet_pieces(path, num_rows) if suffix == ".parquet" else _arrow_pieces(path, num_rows):
                _require_readable(path, table.schema)
                yield table
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable {suffix} file: {str(error).splitlines()[0]}") from None


def _lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file with their ends; only a line feed ends one."""
    start = 0
    with path.open("rb") as file:
        for line in file:
            try:
                yield line.decode("utf-8" if start else "utf-8-sig")
            except UnicodeDecodeError as error:
                byte = start + error.start
                raise UserError(f"{path}: byte {byte} is not UTF-8 text; save the file as UTF-8") from None
            start += len(line)


def _delimited_pieces(
    path: Path, delimiter: str, columns: Sequence[str] | None, num_rows: int | None
) -> Iterator[pa.Table]:
    rows: Iterator[list[str]]
    if delimiter == "," or _quotes_are_consistent(_lines(path)):
        rows = _quoted_rows(path, delimiter)
    else:
        # Bare quotes, as in `"The Office" is back<TAB>1`: read as quoting, they would swallow whole lines.
        rows = (_without_end(line).split(delimiter) for line in _lines(path))
    rows = (row for row in rows if row and row != [""])
    names = list(columns) if columns else next(rows, [])
    _refuse_repeated(path, names)
    first = 1
    while piece := list(islice(rows, num_rows)):
        yield _rectangular(path, delimiter, piece, names, first, "data.columns" if columns else "the header")
        first += len(piece)
    if first == 1:
        raise UserError(f"{path}: no rows" + ("" if columns else " under the header line"))


def _without_end(line: str) -> str:
    return line.removesuffix("\n").removesuffix("\r")


def _quotes_are_consistent(lines: Iterable[str]) -> bool:
    """Whether every tab-separated field of every line that opens with a quote is a properly quoted one."""
    fields = (field for line in lines if '"' in line for field in _without_end(line).split("\t"))
    first = next(fields, None)
    # Without any quote, plain splitting gives the same, several times faster.
    return first is not None and all(_FIELD.fullmatch(field) for field in chain([first], fields))


def _quoted_rows(path: Path, delimiter: str) -> Iterator[list[str]]:
    limit = csv.field_size_limit(MAX_FIELD_CHARS)
    # Lines keep their ends, so that a line break inside a quoted field comes through unchanged.
    reader = csv.reader(_lines(path), delimiter=delimiter, strict=True)
    try:
        yield from reader
    except csv.Error as error:
        raise UserError(
            f"{path}:{reader.line_num}: malformed row: {error}. Quote a field that holds {delimiter!r}, a line break "
            'or a quote, and double the quotes inside it ("")'
        ) from None
    finally:
        csv.field_size_limit(limit)


def _rectangular(
    path: Path, delimiter: str, rows: list[list[str]], names: Sequence[str], first: int, source: str
) -> pa.Table:
    """The rows as columns of text; the first has the number `first`."""
    ragged = [(i, row) for i, row in enumerate(rows, first) if len(row) != len(names)]
    if ragged:
        number, row = ragged[0]
        more = f" ({len(ragged)} such rows)" if len(ragged) > 1 else ""
        rule = "A comma separates columns; a field that holds one must be quoted"
        if delimiter == "\t":
            rule = "A tab separates columns, a line break rows; write fields that hold either as .csv or .jsonl"
        raise UserError(
            f"{path}: row {number} has {len(row)} columns, {source} has {len(names)}{more}: {row!r:.200}. {rule}"
        )
    return pa.table([pa.array(column, pa.string()) for column in zip(*rows, strict=True)], names=names)


def _json_pieces(path: Path, num_rows: int | None) -> Iterator[pa.Table]:
    """One object a line, a list of objects, or an object of equally long columns."""
    text = "".join(_lines(path))
    try:
        whole = json.loads(text) if text.strip() else []
    except json.JSONDecodeError as error:
        if error.msg != "Extra data" or error.lineno == 1:
            raise UserError(f"{path}:{error.lineno}:{error.colno}: not valid JSON: {error.msg}") from None
        yield from _object_pieces(path, _objects(path, text.split("\n")), num_rows)
        return
    except (RecursionError, ValueError) as error:
        raise UserError(f"{path}: {_beyond_reading(error)}") from None
    if isinstance(whole, list):
        yield from _slices(path, _from_objects(path, whole), num_rows)
    elif isinstance(whole, dict) and whole and all(isinstance(column, list) for column in whole.values()):
        yield from _slices(path, _from_columns(path, whole), num_rows)
    elif "\n" in text.strip() or not isinstance(whole, dict):
        raise UserError(
            f"{path}: neither a list of objects nor one of columns; write [{{...}}, ...] or one object a line"
        )
    else:
        yield _from_objects(path, [whole])


def _object_pieces(path: Path, objects: Iterator[Any], num_rows: int | None) -> Iterator[pa.Table]:
    first = 1
    while piece := list(islice(objects, num_rows)):
        yield _from_objects(path, piece, first)
        first += len(piece)
    if first == 1:
        raise UserError(f"{path}: no rows")


def _objects(path: Path, lines: Iterable[str]) -> Iterator[Any]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}:{number}:{error.colno}: not valid JSON: {error.msg}: {line!r:.120}") from None
            except (RecursionError, ValueError) as error:
                raise UserError(f"{path}:{number}: {_beyond_reading(error)}") from None


def _beyond_reading(error: RecursionError | ValueError) -> str:
    """What Python's reader does not take of valid JSON."""
    if isinstance(error, RecursionError):
        return "lists or objects within each other, too deep to be read; make them flat"
    return "a number of thousands of digits, too long to be read; write it in quotes"


def _from_objects(path: Path, objects: Sequence[Any], first: int = 1) -> pa.Table:
    """The objects as columns; the first is row number `first`."""
    wrong = next((i for i, item in enumerate(objects) if not isinstance(item, dict)), None)
    if wrong is not None:
        raise UserError(f"{path}: row {first + wrong} is not an object of columns: {objects[wrong]!r:.120}")
    names = list(dict.fromkeys(name for item in objects for name in item))
    return _from_columns(path, {name: [item.get(name) for item in objects] for name in names}, first)


def _from_columns(path: Path, columns: dict[str, list[Any]], first: int = 1) -> pa.Table:
    lengths = {name: len(column) for name, column in columns.items()}
    if not lengths or max(lengths.values()) == 0:
        raise UserError(f"{path}: no rows")
    if len(set(lengths.values())) > 1:
        raise UserError(f"{path}: columns of different lengths: {', '.join(f'{k} {v}' for k, v in lengths.items())}")
    return pa.table({name: _typed(path, name, column, first) for name, column in columns.items()})


def _typed(path: Path, name: str, column: list[Any], first: int) -> pa.Array:
    array = _array(column)
    if not isinstance(array, Exception):
        return array
    # The shortest start of the column that can't be an array ends with the odd cell, however deep in a list it differs.
    odd = bisect_left(range(len(column)), 1, key=lambda i: isinstance(_array(column[: i + 1]), Exception))
    cell, alone = f"row {first + odd} holds {column[odd]!r:.80}", _array(column[odd : odd + 1])
    if isinstance(alone, OverflowError):
        what = f": {cell}, a whole number beyond 64 bits; write it in quotes"
    elif isinstance(alone, UnicodeEncodeError):
        what = f": {cell}, with half of a character (position {alone.start}); remove it"
    else:
        what = f" mixes kinds of values: {cell}"
        if not isinstance(alone, Exception):
            what += f", earlier rows such as {next(value for value in column if value is not None)!r:.80}"
    raise UserError(f"{path}: column {name!r}{what}")


def _array(cells: list[Any]) -> Any:
    """The cells as an array, or the exception that says why they can't be one."""
    try:
        return pa.array(cells)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError) as error:
        return error


def _parquet_pieces(path: Path, num_rows: int | None) -> Iterator[pa.Table]:
    if num_rows is None:
        yield from _slices(path, pyarrow.parquet.read_table(path), None)
        return
    with pyarrow.parquet.ParquetFile(path) as file:
        if file.metadata.num_rows == 0:
            raise UserError(f"{path}: no rows")
        for batch in file.iter_batches(num_rows):
            yield pa.Table.from_batches([batch])


def _arrow_pieces(path: Path, num_rows: int | None) -> Iterator[pa.Table]:
    """Both of Arrow's formats: the stream that `datasets` writes, and the random-access file."""
    source = pa.memory_map(str(path))
    try:
        table = pa.ipc.open_stream(source).read_all()
    except pa.ArrowInvalid:
        table = pa.ipc.open_file(source).read_all()
    yield from _slices(path, table, num_rows)


def _require_readable(path: Path, schema: pa.Schema) -> None:
    """Raises UserError for columns of one name, or of a kind that `datasets` knows no name for, needed or not."""
    _refuse_repeated(path, schema.names)
    for field in schema:
        try:
            Features.from_arrow_schema(pa.schema([field]))
        except (ValueError, NotImplementedError):
            raise UserError(
                f"{path}: column {field.name!r} holds {field.type}, which can't be read; leave it out of the file, or "
                "write it as text"
            ) from None


def _refuse_repeated(path: Path, names: Sequence[str]) -> None:
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise UserError(f"{path}: two columns are called {repeated[0]!r}: {', '.join(names)}")


def _slices(path: Path, table: pa.Table, num_rows: int | None) -> Iterator[pa.Table]:
    if table.num_rows == 0:
        raise UserError(f"{path}: no rows")
    size = num_rows or table.num_rows
    for start in range(0, table.num_rows, size):
        yield table.slice(start, size)


def missing_path(path: Path, key: str) -> UserError:
    """The error for a path that isn't there, with the nearest names of the folder it should be in."""
    if os.path.lexists(path):
        return UserError(f"{key}: {path} is neither a file nor a folder, but a pipe, a device or a link to nothing")
    parent = path.parent
    while not parent.is_dir() and parent != parent.parent:
        parent = parent.parent
    names = sorted(item.name for item in parent.iterdir() if item.name[0] != ".") if parent.is_dir() else []
    lost = path.relative_to(parent).parts[0] if parent in path.parents else path.name
    guess = did_you_mean(lost, names) if nearest(lost, names) else ""  # not whatever else the folder holds
    return UserError(f"{key}: {path} does not exist (looked in {parent.resolve()}). {guess}".rstrip())
