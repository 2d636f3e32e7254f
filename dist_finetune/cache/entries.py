"""The entries of a cache folder: what is there, when it was used, and room for more."""

import errno
import hashlib
import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_finetune.spec import Spec

META = "meta.json"
GIVEN_UP_S = 7 * 86400.0


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
    return Path(spec.cache.folder) if spec.cache.folder else Path(spec.output) / ".cache"


def list_entries(root: Path) -> list[CacheEntry]:
    """Complete entries, least recently used first."""
    entries = []
    for meta in root.glob(f"*/{META}"):
        folder = meta.parent
        if not folder.name.startswith("."):
            size = sum(p.stat().st_size for p in folder.iterdir())
            source = json.loads(meta.read_text(encoding="utf-8"))["source"]
            entries.append(CacheEntry(folder.name, size, meta.stat().st_mtime, source))
    return sorted(entries, key=lambda entry: entry.used)


def make_room(root: Path, needed: int, quota: int) -> None:
    """Deletes least recently used entries until `needed` bytes more keep within `quota`, and what was begun and given
    up long ago. Raises OSError, and deletes nothing, where they could never keep within it."""
    if needed > quota:
        mib = 2**20
        told = f"{needed / mib:,.0f} MiB are more than cache.quota, which is {quota / mib:,.0f} MiB"
        raise OSError(errno.EDQUOT, told)
    for part in root.glob(".*"):
        if time.time() - part.stat().st_mtime > GIVEN_UP_S:
            shutil.rmtree(part, ignore_errors=True) if part.is_dir() else part.unlink(missing_ok=True)
    entries = list_entries(root)
    held = sum(entry.num_bytes for entry in entries)
    for entry in entries:
        if held + needed <= quota:
            break
        shutil.rmtree(root / entry.key, ignore_errors=True)
        held -= entry.num_bytes


def clear(root: Path) -> int:
    """Deletes every entry and leftover; returns the bytes freed."""
    freed = sum(p.stat().st_size for p in root.rglob("*") if p.is_file()) if root.is_dir() else 0
    shutil.rmtree(root, ignore_errors=True)
    return freed


def touch(folder: Path) -> None:
    """Marks an entry as used now."""
    os.utime(folder / META)
