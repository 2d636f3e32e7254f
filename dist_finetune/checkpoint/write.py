"""Saving: a snapshot in host memory while training waits, then files written in the background by every rank.

The ranks meet on the shared disk, not in collectives: each leaves its shard and then a note with size and hash; rank 0
waits for all notes, writes COMPLETE last and renames the folder. Until the rename nothing is there; after it all is.
Every file is on the disk before COMPLETE names it, and every entry before the rename, so that a power cut between any
two lines leaves either the new checkpoint whole or the old ones alone. docs/checkpoints.md goes through the moments.
"""

import contextlib
import errno
import json
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from dist_finetune.checkpoint.hashing import sha256_of
from dist_finetune.checkpoint.layout import COMPLETE, FOLDER, FORMAT_VERSION, STATE, folder_name, shard_name, step_of
from dist_finetune.checkpoint.layout import checkpoint_folders as checkpoints_of
from dist_finetune.checkpoint.read import damage
from dist_finetune.engine import Engine
from dist_finetune.errors import TrainingError
from dist_finetune.run_folder import write_json
from dist_finetune.tensor_files import write_tensors
from dist_finetune.world import World, gather_objects, on_first, patience

NOTE_SUFFIX = ".note.json"
POLL_S = 0.02
SPARE_BYTES = 16 * 2**20  # JSON files, and room for what else is written meanwhile


class CheckpointWriter:
    """Writes the checkpoints of one run. All methods are called by every rank at the same step."""

    def __init__(
        self, run: Path, keep: int, protected: int | None, world: World, timeout_s: float, say: Callable[[str], None]
    ) -> None:
        self._root, self._keep, self._world = run / FOLDER, keep, world
        self._timeout_s, self._say = timeout_s, say
        self._thread: threading.Thread | None = None
        self._error: str | None = None
        self._lost_shard: str | None = None
        self._protected = protected if protected is not None and self._has(protected) else None
        self._token = on_first(world, self._clean)

    def save(self, step: int, tensors: dict[str, torch.Tensor], state: dict[str, Any], best: bool = False) -> None:
        """Starts writing the checkpoint of `step`; `tensors` is this rank's snapshot (see `snapshot`), which it keeps.
        Once it is complete, the `best` is protected in place of the one before.

        Waits for an earlier save that is still being written. A failed save is told loudly, and training goes on with
        the checkpoints that are there.
        """
        self.wait()
        part = self._root / f".{folder_name(step)}.{self._token}"
        num_bytes = sum(gather_objects(sum(t.nbytes for t in tensors.values())))
        error = on_first(self._world, lambda: _begin(part, num_bytes))
        if error:
            self._fail(error)
            return
        work = (part, step, tensors, state, best) if self._world.is_first else (part, tensors)
        target = self._lead if self._world.is_first else self._write_shard
        self._thread = threading.Thread(target=self._guarded, args=(target, *work), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self, must_succeed: bool = False) -> None:
        """Waits until no rank is writing. Raises TrainingError on every rank for a failed save where it
        `must_succeed`."""
        with patience():
            if self._thread and not self._world.is_first:
                self._thread.join()
            # A rank whose disk is full can't even leave a note: rank 0 must not wait for one.
            failures = [error for error in gather_objects(None if self._world.is_first else self._error) if error]
            if failures:
                self._lost_shard = failures[0]
            if self._thread and self._world.is_first:
                self._thread.join()
            error = on_first(self._world, lambda: self._error)
            self._thread = self._error = self._lost_shard = None
        if error and must_succeed:
            raise TrainingError(f"checkpoint not saved: {error}")

    def protect(self, step: int) -> None:
        """Rotation leaves the checkpoint of `step` alone from now on, if saving it succeeded."""
        self.wait()
        if self._has(step):
            self._protected = step

    def protected(self) -> int | None:
        """Step of the best checkpoint that is there, which rotation leaves alone."""
        return on_first(self._world, lambda: self._protected)

    def let_finish(self, timeout_s: float) -> None:
        """Gives this rank's part of a save up to `timeout_s` to end, without asking other ranks."""
        if self._thread:
            self._thread.join(timeout_s)

    def _has(self, step: int) -> bool:
        return (self._root / folder_name(step)).exists()

    def _clean(self) -> str:
        """Removes what a killed job left half-written or half-deleted; returns a name for this job's own parts."""
        for leftover in self._root.glob(".step-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        return secrets.token_hex(4)

    def _fail(self, error: object) -> None:
        self._error = str(error)
        self._say(f"WARNING checkpoint not saved: {error}. Training goes on; the checkpoints before it are untouched.")

    def _guarded(self, work: Callable[..., None], *args: Any) -> None:
        try:
            work(*args)
        except BaseException as error:
            self._fail(error)

    def _lead(self, part: Path, step: int, tensors: dict[str, torch.Tensor], state: dict[str, Any], best: bool) -> None:
        try:
            self._write_shard(part, tensors)
            files = {n["file"]: {"size": n["size"], "sha256": n["sha256"]} for n in self._notes(part)}
            write_json(part / STATE, state)
            files[STATE] = {"size": (part / STATE).stat().st_size, "sha256": sha256_of(part / STATE)}
            for note in part.glob(f"*{NOTE_SUFFIX}"):
                note.unlink()
            write_json(part / COMPLETE, {"format": FORMAT_VERSION, "step": step, "files": files})
            sync_folder(part)
            self._publish(part, self._root / folder_name(step))
            if best:
                self._protected = step
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        try:
            self._rotate(step)
        except OSError as error:
            self._say(f"WARNING {folder_name(step)} is saved, but an older checkpoint can't be deleted: {error}")

    def _publish(self, part: Path, final: Path) -> None:
        """Gives a whole checkpoint its name. One that a run before this one left stays, unless it is damaged: it holds
        the same, and must not be gone for an instant."""
        if final.exists() and damage(final) is None:
            shutil.rmtree(part)
            return
        if final.exists():
            _delete(final)
        part.rename(final)
        for folder in (self._root, self._root.parent, self._root.parent.parent):
            sync_folder(folder)  # the first checkpoint's parents are new as well

    def _write_shard(self, part: Path, tensors: dict[str, torch.Tensor]) -> None:
        name = shard_name(self._world.rank)
        note = part / f"{name}{NOTE_SUFFIX}"
        try:
            write_tensors(tensors, part / name)
            sync_file(part / name)
            found = {"file": name, "size": (part / name).stat().st_size, "sha256": sha256_of(part / name)}
        except Exception as error:
            message = f"rank {self._world.rank}: {error}"
            with contextlib.suppress(OSError):
                write_json(note, {"file": name, "error": message})
            raise OSError(message) from error
        write_json(note, found)

    def _notes(self, part: Path) -> list[dict[str, Any]]:
        """The notes of all ranks, as they come in. Reading the folder, instead of asking for each file, keeps a network
        file system from answering with what it remembers; still, another node's note may be seen seconds late."""
        deadline = time.monotonic() + self._timeout_s
        missing = {f"{shard_name(rank)}{NOTE_SUFFIX}": rank for rank in range(self._world.world_size)}
        notes: list[dict[str, Any]] = []
        while missing:
            for path in [path for path in part.iterdir() if path.name in missing]:
                del missing[path.name]
                notes.append(json.loads(path.read_text(encoding="utf-8")))
                if "error" in notes[-1]:
                    raise OSError(notes[-1]["error"])
            if missing and self._lost_shard:
                raise OSError(self._lost_shard)
            if missing and time.monotonic() > deadline:
                late = sorted(missing.values())
                raise TimeoutError(f"ranks {late} wrote no shard within {self._timeout_s:.0f} s (launch.file_timeout)")
            time.sleep(POLL_S)
        return notes

    def _rotate(self, newest: int) -> None:
        """Deletes the oldest complete checkpoints beyond `keep`, now that a newer one is complete, and those of later
        steps: the run started from an earlier one because they are damaged."""
        folders = checkpoints_of(self._root.parent)
        kept = [folder for folder in folders if (step_of(folder) or 0) <= newest][: self._keep]
        for folder in folders:
            if folder not in kept and step_of(folder) != self._protected:
                _delete(folder)


def snapshot(engine: Engine, world: World, whole: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Host copies of what this rank writes: its pieces of weights and moments, and on rank 0 the `whole` tensors.

    `whole` gives (key, tensor) of moving buffers and of weights that trained in an earlier phase. Collective where
    weights are sharded.
    """
    fragments = list(engine.fragments())
    if not engine.is_partitioned:
        mine = snapshot_share([f.weight.numel() for f in fragments], world.rank, world.world_size)
        fragments = [fragments[i] for i in mine]
    tensors = {}
    for f in fragments:
        tensors[f"weight:{f.name}@{f.offset}"] = f.weight.to("cpu", copy=True)
        for kind, moment in f.moments.items():
            tensors[f"{kind}:{f.name}@{f.offset}"] = moment.to("cpu", copy=True)
    for key, tensor in whole:
        with engine.gathered(tensor) as gathered:
            if world.is_first:
                tensors[key] = gathered.detach().to("cpu", copy=True).contiguous()
    return tensors


def snapshot_share(sizes: list[int], rank: int, world_size: int) -> list[int]:
    """Indices that `rank` writes where every rank holds everything: the largest first to whoever has least."""
    loads = [0] * world_size
    mine = []
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        lightest = loads.index(min(loads))
        loads[lightest] += sizes[index]
        if lightest == rank:
            mine.append(index)
    return sorted(mine)


def _delete(folder: Path) -> None:
    """Deletes a checkpoint; under another name first, since a half-deleted folder must not look like one."""
    doomed = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _begin(part: Path, num_bytes: int) -> str | None:
    """Makes the folder that all ranks write into; returns what is wrong where there is no place for `num_bytes`."""
    try:
        part.mkdir(parents=True)
        free = shutil.disk_usage(part).free
        if free < num_bytes + SPARE_BYTES:
            part.rmdir()
            return no_space(part.parent, free, num_bytes)
    except OSError as error:
        return f"{part.parent} can't be written: {error.strerror or error}"
    return None


def no_space(folder: Path, free_bytes: int, num_bytes: int) -> str:
    """The message that a checkpoint has no room."""
    return (
        f"{folder} has {free_bytes / 2**20:,.0f} MiB free, a checkpoint needs "
        f"{(num_bytes + SPARE_BYTES) / 2**20:,.0f} MiB; free some space or lower checkpoint.keep"
    )


def sync_file(path: Path) -> None:
    """Flushes a file's content to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Flushes a folder's entries to the disk, so that a rename survives a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EBADF, errno.EINVAL):  # some file systems can't do it, and need not
            raise
    finally:
        os.close(handle)
