"""The entries of a cache folder: what is there, when it was used, and room for more."""

import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_finetune.home import expand_home
from dist_finetune.run_folder import output_of
from dist_finetune.spec import Spec

META = "meta.json"
GIVEN_UP_S = 7 * 86400.0
OWN = re.compile(r"(tokens-)?[0-9a-f]{20}")
OWN_LEFTOVER = re.compile(rf"\.({OWN.pattern}\.(\d+x\d+|turn-\d+|[0-9a-f]{{8}})|speed-\d+)")
"""Nothing else is ever deleted: `cache.folder` may be a folder that holds more than a cache."""
IN_USE_S = 86400.0
"""A job may train from what was opened within so long; on a network disk other nodes lose what is deleted here."""


@dataclass(frozen=True)
class CacheEntry:
    """One stored key, for `cache ls`."""

    key: str
    num_bytes: int
    used: float
    """When it was last opened, seconds since the epoch."""
    source: str


def hash_of(value: Any) -> str:
    """sha256 of JSON values: the key of an entry comes from a hash of all that decides what is stored."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def cache_root(spec: Spec) -> Path:
    """The folder that holds the entries of a run: `cache.folder`, else <output>/.cache."""
    return expand_home(spec.cache.folder) if spec.cache.folder else output_of(spec) / ".cache"


def list_entries(root: Path) -> list[CacheEntry]:
    """Complete entries, least recently used first."""
    entries = []
    for folder in _own(root, OWN):
        meta = folder / META
        with suppress(FileNotFoundError):  # not complete, or another job has just evicted it
            source = _source(meta)
            size = sum(p.stat().st_size for p in folder.iterdir())
            entries.append(CacheEntry(folder.name, size, meta.stat().st_mtime, source))
    return sorted(entries, key=lambda entry: entry.used)


def _source(meta: Path) -> str:
    """The model that an entry is of. A damaged entry counts too: it takes room, until it is evicted as others are."""
    try:
        return str(json.loads(meta.read_text(encoding="utf-8"))["source"])
    except (ValueError, KeyError, TypeError):
        return f"damaged: {meta.name} can't be read"


def _own(root: Path, names: re.Pattern[str]) -> Iterator[Path]:
    """What lies directly in `root` under a name that only a cache gives."""
    return (path for path in root.glob("*") if names.fullmatch(path.name))


def _delete(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def make_room(root: Path, needed: int, quota: int) -> None:
    """Deletes least recently used entries until `needed` bytes more keep within `quota`, and what was begun and given
    up long ago. Raises OSError, and deletes no entry, where they can't keep within it while others are in use."""
    mib = 2**20
    if needed > quota:
        told = f"{needed / mib:,.0f} MiB are more than cache.quota, which is {quota / mib:,.0f} MiB"
        raise OSError(errno.EDQUOT, told)
    for part in _own(root, OWN_LEFTOVER):
        with suppress(OSError):  # it has just gone, or is another user's
            if time.time() - part.stat().st_mtime > GIVEN_UP_S:
                _delete(part)
    entries = list_entries(root)
    held = sum(entry.num_bytes for entry in entries)
    unused = [entry for entry in entries if time.time() - entry.used > IN_USE_S]
    in_use = held - sum(entry.num_bytes for entry in unused)
    if in_use + needed > quota:
        told = f"{needed / mib:,.0f} MiB and the {in_use / mib:,.0f} MiB of entries that were used within a day"
        raise OSError(errno.EDQUOT, f"{told} are more than cache.quota, which is {quota / mib:,.0f} MiB")
    for entry in unused:
        if held + needed <= quota:
            break
        shutil.rmtree(root / entry.key, ignore_errors=True)
        held -= entry.num_bytes


def clear(root: Path) -> int:
    """Deletes every entry and leftover, and the folder where nothing else is in it; returns the bytes freed."""
    freed = 0
    for path in [*_own(root, OWN), *_own(root, OWN_LEFTOVER)]:
        freed += sum(p.stat().st_size for p in (path, *path.rglob("*")) if p.is_file())
        _delete(path)
    with suppress(OSError):
        root.rmdir()
    return freed


def touch(folder: Path) -> None:
    """Marks an entry as used now, where it may be written: one of a colleague or a read-only disk can be read too."""
    with suppress(OSError):
        os.utime(folder / META)
