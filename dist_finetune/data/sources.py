"""What `data.train`, `data.validation` and `data.test` can name, each read into one table that knows its files.
So can the DATA of a command: its role is "DATA".

Kinds: files, a folder of class folders, a folder that `datasets` saved, `builtin:NAME`, and a hub id. A hub id may
carry a config and a split, `nyu-mll/glue:sst2[validation]`; a saved folder may carry a split.
"""

import glob
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import pyarrow as pa
from datasets import Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature

from dist_finetune.data.arrow import column_values, in_memory
from dist_finetune.data.builtin import read_builtin
from dist_finetune.data.files import DELIMITERS, SUFFIXES, missing_path, read_file
from dist_finetune.data.hub import load_from_hub
from dist_finetune.data.label_kind import is_string
from dist_finetune.errors import UserError, did_you_mean
from dist_finetune.home import expand_home

# Splits that a role takes when none is named, best first.
HELD_OUT = ("validation", "val", "valid", "dev", "test")
ROLE_SPLITS = {"train": ("train",), "validation": HELD_OUT, "test": ("test",), "DATA": HELD_OUT}
SPLIT_FOLDERS = {"train", "training", "val", "valid", "validation", "dev", "test"}
MAX_PLACES = 8  # rows a message names
IGNORED_FILES = {"thumbs.db", "desktop.ini"}

_HUB_ID = re.compile(r"(?P<id>[\w.-]+(?:/[\w.-]+)?)(?::(?P<config>[\w.-]+))?(?:\[(?P<split>[\w.+-]+)\])?")
_SAVED = re.compile(r"(?P<folder>.+?)\[(?P<split>[\w.+-]+)\]")


@dataclass(frozen=True)
class Source:
    """One split as read. `files` lists (name, rows) in order, so that a row number can be told as file and row; of a
    piece of one file, its first row has the number `first_row`."""

    table: Dataset
    files: tuple[tuple[str, int], ...]
    first_row: int = 1

    @property
    def names(self) -> str:
        """The files (or other items) as one phrase."""
        names = [name for name, _ in self.files]
        return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

    def places(self, rows: Sequence[int]) -> str:
        """`train.csv row 3, row 7` for ascending rows counted from 0 over all files; in words they count from 1."""
        parts: list[str] = []
        start, told = 0, None
        for name, num_rows in self.files:
            for row in rows[:MAX_PLACES]:
                if start <= row < start + num_rows:
                    parts.append(f"{'' if told == name else name + ' '}row {row - start + self.first_row}")
                    told = name
            start += num_rows
        more = f" and {len(rows) - MAX_PLACES} more" if len(rows) > MAX_PLACES else ""
        return ", ".join(parts) + more


def read_source(items: Sequence[str], role: str, columns: Sequence[str] | None = None) -> Source:
    """The rows of all `items` of `data.<role>` (train, validation or test) or of a command's DATA, in order.

    Raises UserError where something is missing, empty or malformed, or where items have different columns.
    """
    key = key_of(role)
    names = [path for item in items for path in expand(item, key)]
    if not names or not all(names):  # an empty one would be the folder that the process is in
        raise UserError(f"{key} is empty; name a file, a folder, a hub id or builtin:NAME")
    sources = [_read_one(name, role, columns) for name in names]
    first = sources[0]
    for name, source in zip(names[1:], sources[1:], strict=True):
        if set(source.table.column_names) != set(first.table.column_names):
            raise UserError(
                f"{key}: {name} has columns {', '.join(source.table.column_names)}, "
                f"{names[0]} has {', '.join(first.table.column_names)}; files read together need the same columns"
            )
    if len(sources) == 1:
        return first
    try:
        table = datasets.concatenate_datasets([source.table for source in sources])
    except (ValueError, TypeError, pa.ArrowInvalid) as error:
        raise UserError(f"{key}: {', '.join(names)} hold different kinds of values: {error}") from None
    return Source(table, tuple(file for source in sources for file in source.files))


def key_of(role: str) -> str:
    """What messages call a role: the config's key, or a command's argument (written in capitals)."""
    return role if role.isupper() else f"data.{role}"


def images_at(paths: Sequence[str], column: str, place: str, first_row: int = 1) -> Source:
    """Image files as rows of one column, decoded when used; `place` is the folder that messages name."""
    cells = [{"bytes": None, "path": path} for path in paths]
    table = Dataset.from_dict({column: cells}, features=Features({column: ImageFeature()}))
    return Source(table, ((place, len(paths)),), first_row)


def paths_as_images(source: Source, column: str) -> Dataset:
    """One column of the source, file paths that count from the folder of the file they stand in, as images."""
    if not is_string(source.table, column):
        raise UserError(
            f"{source.names}: data.image={column}: the column holds neither images nor paths of image files"
        )
    paths = column_values(source.table, column)
    folders = [expand_home(name).parent for name, num_rows in source.files for _ in range(num_rows)]
    cells = [path and {"bytes": None, "path": str(folder / path)} for folder, path in zip(folders, paths, strict=True)]
    return Dataset.from_dict({column: cells}, features=Features({column: ImageFeature()}))


def _read_one(item: str, role: str, columns: Sequence[str] | None) -> Source:
    key = key_of(role)
    if item.startswith("builtin:"):
        table = read_builtin(item.removeprefix("builtin:"))
        return Source(table, ((item, len(table)),))
    path = expand_home(item)
    if path.is_file():
        table = in_memory(read_file(path, columns if path.suffix.lower() in DELIMITERS else None))
        return Source(table, ((item, len(table)),))
    if path.is_dir():
        return _read_folder(path, item, role, split=None)
    saved = saved_split(item)
    if saved:
        return _read_folder(saved[0], item, role, saved[1])
    hub = hub_parts(item)
    if hub is None:
        raise missing_path(path, key)
    found = load_from_hub(str(hub["id"]), hub["config"], key)
    return _split_of(found, hub["split"], item, role)


def hub_parts(item: str) -> dict[str, str | None] | None:
    """The id, config and split of an item that can only be a hub id; None for what is here, or was meant as a path."""
    path, hub = expand_home(item), _HUB_ID.fullmatch(item)
    # A name with a data suffix, or below a folder that exists here, was meant as a path.
    is_path = (
        _suffix(item) in SUFFIXES
        or item.startswith((".", "/", "~"))
        or (path.parent != Path() and path.parent.is_dir())
    )
    if hub is None or is_path or saved_split(item) or path.exists() or item.startswith("builtin:"):
        return None
    return hub.groupdict()


def expand(item: str, key: str) -> list[str]:
    """The files of a glob such as `data/*.csv`, sorted; any other item as it is."""
    found = globbed(item)
    if found == []:
        raise UserError(f"{key}: no file matches {item} (looked from {Path.cwd()})")
    return [item] if found is None else found


def globbed(item: str, root: str | Path = ".") -> list[str] | None:
    """What matches a glob, sorted, seen from `root`; None for any other item."""
    if not re.search(r"[*?]", item):
        return None
    return sorted(glob.glob(str(expand_home(item)), root_dir=root))  # noqa: PTH207 - a pattern may be absolute


def saved_split(item: str, root: str | Path = ".") -> tuple[Path, str] | None:
    """The folder and split that `FOLDER[SPLIT]` names, where there is such a folder seen from `root`."""
    saved = _SAVED.fullmatch(item)
    if saved is None:
        return None
    folder = expand_home(saved["folder"])
    return (folder, saved["split"]) if (root / folder).is_dir() else None


def _suffix(item: str) -> str:
    return Path(item).suffix.lower()


def _read_folder(path: Path, item: str, role: str, split: str | None) -> Source:
    key = key_of(role)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        try:
            saved = datasets.load_from_disk(str(path))
        except (OSError, ValueError, KeyError, pa.ArrowInvalid) as error:
            raise UserError(f"{key}: {path} looks like a folder of save_to_disk, but can't be read: {error}") from None
        return _split_of(saved, split, item, role)
    if split is not None:
        raise UserError(
            f"{key}: {item}: [{split}] picks a split of a folder of save_to_disk, and {path} is none; leave it out"
        )
    inside = [entry for entry in sorted(path.iterdir()) if not entry.name.startswith(".")]
    folders = [entry for entry in inside if entry.is_dir()]
    files = [entry for entry in inside if entry.suffix.lower() in SUFFIXES]
    if not folders and files:
        raise UserError(
            f"{key}: {path} is a folder of files; name the files, such as {files[0]} or {path}/*{files[0].suffix}"
        )
    if not folders:
        raise UserError(f"{key}: {path} has no class folders; images are laid out as {path}/CLASS/IMAGE.jpg")
    if {folder.name.lower() for folder in folders} <= SPLIT_FOLDERS:
        lines = {_role_of(folder.name): folder for folder in reversed(folders)}
        wanted = ", ".join(f"data.{name}: {folder}" for name, folder in sorted(lines.items()))
        raise UserError(f"{key}: {path} holds splits, not classes; write {wanted}")
    return _read_class_folders(folders, key)


def _role_of(folder: str) -> str:
    name = folder.lower()
    return "train" if name.startswith("train") else "test" if name == "test" else "validation"


def _read_class_folders(folders: Sequence[Path], key: str) -> Source:
    """Rows "image" (a path, decoded when used) and "label" (the class folder's name)."""
    paths: list[str] = []
    labels: list[str] = []
    empty = []
    for folder in folders:
        images = [str(file) for file in sorted(visible_files(folder))]
        if not images:
            empty.append(folder.name)
        paths += images
        labels += [folder.name] * len(images)
    if empty:
        raise UserError(f"{key}: no files in class folder {', '.join(empty)} of {folders[0].parent}; fill or remove it")
    source = images_at(paths, "image", str(folders[0].parent))
    return replace(source, table=source.table.add_column("label", labels, feature=Value("string")))


def visible_files(folder: Path) -> Iterator[Path]:
    """The files at any depth of `folder`, without hidden ones and those that file managers leave."""
    for file in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if file.is_file() and not hidden and file.name.lower() not in IGNORED_FILES:
            yield file


def _split_of(found: Dataset | DatasetDict, split: str | None, item: str, role: str) -> Source:
    if isinstance(found, Dataset):
        if split is not None:
            raise UserError(f"{key_of(role)}: {item}: there are no splits inside; leave [{split}] out")
        table = found
    else:
        wanted = (split,) if split else ROLE_SPLITS[role]
        name = next((name for name in wanted if name in found), None)
        if name is None:
            base = item.split("[")[0]
            near = did_you_mean(wanted[0], found)
            raise UserError(
                f"{key_of(role)}: {item} has no split {wanted[0]!r}. {near} It has: {', '.join(found)}; "
                f"write {key_of(role)}: {base}[SPLIT]"
            )
        table, item = found[name], f"{item.split('[')[0]}[{name}]"
    if len(table) == 0:
        raise UserError(f"{key_of(role)}: {item}: no rows")
    return Source(table, ((item, len(table)),))
