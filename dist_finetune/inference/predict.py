"""A run's model on rows without labels: piece by piece, in the order of the input, in bounded memory."""

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any

from dist_finetune.data.arrow import column_values, in_memory
from dist_finetune.data.files import DELIMITERS, SUFFIXES, missing_path, read_pieces
from dist_finetune.data.sources import Source, images_at, visible_files
from dist_finetune.data.tables import unlabelled_table
from dist_finetune.errors import UserError, did_you_mean
from dist_finetune.evaluate import predict_share
from dist_finetune.inference.decode import AnyPrediction, decode
from dist_finetune.inference.saved_run import SavedRun, opened_run

PIECE_ROWS = {"text": 4096, "image": 256, "path": 4096}  # that are in memory at a time; of images, or of their paths
OUTPUTS = (".jsonl", ".csv")
ROLE = "FILE"  # what messages call the input

Piece = tuple[Source, Sequence[Any]]
"""Rows of the input and what each is called: its number from 1, an image's path, or a column's value."""


def predict_file(
    folder: Path, path: Path, header: Sequence[str] | None = None, id_column: str | None = None
) -> Iterator[AnyPrediction]:
    """Predictions of a run's model for the rows of a file, the images of a folder (at any depth), or one image.

    `header` names the columns of a .csv or .tsv file without a header line (left out: data.columns of the run);
    `id_column` a column to call rows by instead of their numbers. Labels need not be there. One process; a GPU where
    there is one. Raises UserError for a missing column, an empty text, a damaged image, when it comes to them.
    """
    with opened_run(folder) as (run, world):
        if world.world_size > 1:
            raise UserError(f"predict is one process, and {world.launcher} started {world.world_size}; start it alone")
        for source, ids in _pieces(run, path, header, id_column):
            table = unlabelled_table(source, ROLE, run.columns)
            share = predict_share(run, run.encode(table), run.eval_batch_size, world)
            assert share is not None, "one process has every row"
            yield from decode(run.data.task, share, table, ids, run.data.classes)


def write_predictions(predictions: Iterable[AnyPrediction], file: IO[str], suffix: str) -> int:
    """Writes a line for each prediction, as .jsonl or .csv (with a header line); returns how many."""
    writer = csv.writer(file, lineterminator="\n")
    num_rows = 0
    for found in predictions:
        if suffix == ".csv":
            cells = found.cells()
            if cells is None:
                raise UserError("a row has as many tags as words, which a .csv file can't hold; write .jsonl")
            if num_rows == 0:
                writer.writerow(cells)
            writer.writerow(cells.values())
        else:
            # An id column may hold dates.
            file.write(json.dumps(vars(found), ensure_ascii=False, default=str) + "\n")
        num_rows += 1
    return num_rows


def save_predictions(predictions: Iterable[AnyPrediction], target: Path) -> int:
    """`write_predictions` into a file that is whole or not there; returns how many."""
    if target.suffix not in OUTPUTS:
        raise UserError(f"--to {target}: predictions are written as {' or '.join(OUTPUTS)}")
    temporary = target.with_name(f".{target.name}.part")
    try:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            num_rows = write_predictions(predictions, file, target.suffix)
        temporary.replace(target)
    except OSError as error:
        raise UserError(f"--to {target}: can't be written: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)
    return num_rows


def _pieces(run: SavedRun, path: Path, header: Sequence[str] | None, id_column: str | None) -> Iterator[Piece]:
    if not path.exists():
        raise missing_path(path, ROLE)
    is_image_run = run.data.modality == "image"
    if path.is_file() and (path.suffix.lower() in SUFFIXES or not is_image_run):
        return _row_pieces(run, path, header, id_column)
    if not is_image_run:
        raise UserError(f"{ROLE}: {path} is a folder, and {run.folder} reads text; name a file: {', '.join(SUFFIXES)}")
    if header or id_column:
        raise UserError(f"{ROLE}: {path}: images have no columns; leave --columns and --id out")
    return _image_pieces(path, str(run.columns.image))


def _row_pieces(run: SavedRun, path: Path, header: Sequence[str] | None, id_column: str | None) -> Iterator[Piece]:
    if header is None and path.suffix.lower() in DELIMITERS:
        header = run.spec.data.columns
    first = 1
    are_paths = run.data.modality == "image" and path.suffix.lower() not in (".parquet", ".arrow")
    for table in read_pieces(path, header, PIECE_ROWS["path" if are_paths else run.data.modality]):
        source = Source(in_memory(table), ((str(path), len(table)),), first)
        if id_column is not None and id_column not in table.column_names:
            near = did_you_mean(id_column, table.column_names)
            raise UserError(f"--id {id_column}: {path} has no such column. {near}")
        yield source, range(first, first + len(table)) if id_column is None else column_values(source.table, id_column)
        first += len(table)


def _image_pieces(path: Path, column: str) -> Iterator[Piece]:
    files = [path] if path.is_file() else sorted(visible_files(path))
    if not files:
        raise UserError(f"{ROLE}: {path} holds no files")
    first = 1
    paths = map(str, files)
    while piece := list(islice(paths, PIECE_ROWS["path"])):
        yield images_at(piece, column, str(path), first), piece
        first += len(piece)
