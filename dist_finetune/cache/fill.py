"""Fills an entry: every row once through the frozen prefix, dealt over the ranks; or waits for a job that does."""

import json
import shutil
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dist_finetune.cache.cut import Cut, NoCut, run_prefix
from dist_finetune.cache.entries import META, make_room
from dist_finetune.cache.store import Layout, ShardWriter, write_layout
from dist_finetune.data.batches import cut_rows
from dist_finetune.data.loading import Rows
from dist_finetune.engine.precision import bf16_of
from dist_finetune.evaluate import to_device
from dist_finetune.job import Job
from dist_finetune.run_folder import write_json
from dist_finetune.stopping import refuse_if_told, stop_if_told
from dist_finetune.turns import LostTurn, Queue, Turn
from dist_finetune.world import on_first, patience, together

NOTE_EVERY_S = 30.0  # what a killed run may have to compute again
LOOK_EVERY_S, LOOK_FOR_S = 0.2, 2.0
SEEN_WITHIN_S = 10.0
"""How long a shared disk may keep from other nodes what one of them made."""


@dataclass(frozen=True)
class Entry:
    """An entry to be: its folder, what it is made from, and how the rows of each split will lie in it."""

    folder: Path
    source: dict[str, Any]
    layouts: dict[str, Layout]

    @property
    def num_bytes(self) -> int:
        return sum(layout.num_bytes for layout in self.layouts.values())

    def is_there(self) -> bool:
        return (self.folder / META).exists()


def fill_once(job: Job, model: nn.Module, cut: Cut, entry: Entry) -> bool:
    """Fills the entry, or waits for the job that is filling it; True where that one did. Collective.

    Raises Stopped where the run is told to stop meanwhile, NoCut where the entry can't be kept.
    """
    queue, ours = Queue(entry.folder), list[Turn]()  # a turn is the first rank's
    started_s, limit_s = time.monotonic(), job.plan.spec.launch.file_timeout
    wait = "another job is filling this cache; waiting for it"
    while True:
        stop_if_told(job.signals)
        found = on_first(job.world, lambda: _look(entry, queue, ours))
        if found == "there":
            return True
        try:
            if found == "ours":
                with patience():  # a pass over all data, in which no step is taken
                    _fill_entry(job, model, cut, entry, ours[0] if ours else None)
                return False
        except LostTurn:
            wait = "this job stood still for so long that another one fills the cache; waiting for it"
        finally:
            while ours:
                ours.pop().end(entry.is_there())
        if wait:
            job.report.say(wait)
            wait = ""
        if on_first(job.world, lambda: time.monotonic() - started_s > limit_s):
            raise NoCut("another job has been filling it for longer than launch.file_timeout")


def _look(entry: Entry, queue: Queue, ours: list[Turn]) -> Literal["there", "ours", "wait"]:
    """Whether the entry is there, or our turn, which is put into `ours`; looks for a moment before it says "wait"."""
    until_s = time.monotonic() + LOOK_FOR_S
    try:
        entry.folder.parent.mkdir(parents=True, exist_ok=True)
        while not entry.is_there():
            if turn := queue.take():
                if entry.is_there():  # its job has just ended
                    turn.end(is_done=True)
                    break
                ours.append(turn)
                return "ours"
            if time.monotonic() > until_s:
                return "wait"
            time.sleep(LOOK_EVERY_S)
    except OSError as error:
        raise NoCut(f"{entry.folder.parent} can't be written: {error.strerror}") from None
    return "there"


def require_seen(path: Path) -> None:
    """Raises NoCut where this process does not see what the first one made."""
    until_s = time.monotonic() + SEEN_WITHIN_S
    while not path.exists():
        if time.monotonic() > until_s:
            raise NoCut(
                f"{path.parent} is not the same disk for all processes: what the first one made there is not seen on "
                f"{socket.gethostname()}; set cache.folder to a folder that all nodes share"
            )
        with suppress(OSError):
            list(path.parent.iterdir())  # NFS looks anew
        time.sleep(LOOK_EVERY_S)


def _fill_entry(job: Job, model: nn.Module, cut: Cut, entry: Entry, turn: Turn | None) -> None:
    """Fills a hidden folder, which gets its name when it is complete. A run that was ended goes on where it was."""
    way = f"{job.world.world_size}x{job.plan.batches.eval_batch_size}"  # who makes which rows
    part = entry.folder.with_name(f".{entry.folder.name}.{way}")
    on_first(job.world, lambda: _begin(part, entry, job.plan.spec.cache.quota))
    try:
        writers = together(lambda: _writers(part, entry, job.world.rank))
    except NoCut:
        if turn and not turn.is_lost:
            shutil.rmtree(part, ignore_errors=True)
        raise
    seconds: dict[str, float] = {}

    def fill() -> None:
        for name, rows in job.splits.items():
            started = time.perf_counter()
            try:
                _fill(job, model, cut, rows, writers[name])
            except torch.OutOfMemoryError:
                raise NoCut("filling it runs out of a GPU's memory; train.eval_batch_size has its rows") from None
            seconds[name] = round(time.perf_counter() - started, 3)

    def publish() -> None:
        if turn is None or turn.is_lost:
            raise LostTurn(str(entry.folder))
        try:
            shapes = {name: write_layout(part, name, layout) for name, layout in entry.layouts.items()}
            told = {"source": job.plan.card.name, "made_from": entry.source, "splits": shapes, "seconds": seconds}
            write_json(part / META, told)
            shutil.rmtree(entry.folder, ignore_errors=True)  # the rest of one whose eviction was cut off
            part.rename(entry.folder)
        except OSError as error:
            raise NoCut(f"{entry.folder} can't be written: {error.strerror or error}") from None

    model.to(memory_format=torch.channels_last)  # only until it is sharded: ZeRO lays weights end to end
    try:
        together(fill)
    finally:
        model.to(memory_format=torch.contiguous_format)
    on_first(job.world, publish)


def _begin(part: Path, entry: Entry, quota: int) -> None:
    """Makes the folder to fill. Raises NoCut where quota or disk have no room for the entry."""
    root = part.parent
    try:
        make_room(root, entry.num_bytes, quota)
        missing = entry.num_bytes - sum(512 * path.stat().st_blocks for path in part.glob("*"))
        free = shutil.disk_usage(root).free
        if free < missing * 1.02:
            raise NoCut(f"{root} has {free / 2**20:,.0f} MiB free, the cache needs {missing / 2**20:,.0f} MiB")
        part.mkdir(exist_ok=True)
    except OSError as error:
        raise NoCut(error.strerror or str(error)) from None


def _writers(part: Path, entry: Entry, rank: int) -> dict[str, ShardWriter]:
    """A rank's files of all splits, with their room on the disk."""
    require_seen(part)
    try:
        return {name: ShardWriter(part, name, rank, layout) for name, layout in entry.layouts.items()}
    except FileNotFoundError:  # another job has filled it and given it its name
        raise LostTurn(str(part)) from None
    except OSError as error:
        raise NoCut(f"{part.parent} can't hold {entry.num_bytes / 2**20:,.0f} MiB: {error.strerror}") from None


def _fill(job: Job, model: nn.Module, cut: Cut, rows: Rows, writer: ShardWriter) -> None:
    """This rank's passes of a split through the prefix. Raises Stopped where the run is told to stop."""
    passes = [ids.tolist() for ids in _passes(job, rows)[job.world.rank :: job.world.world_size]]
    num_done, noted_s = writer.num_done, time.monotonic()
    ends = np.cumsum([len(ids) for ids in passes])  # what was noted as done are whole passes
    batches = [ids for ids, end in zip(passes, ends, strict=True) if end > num_done]
    keys = [[(i // rows.num_rows, i % rows.num_rows) for i in ids] if rows.pass_epoch else ids for ids in batches]
    for ids, batch in zip(batches, rows.batches_of(keys), strict=True):
        if job.signals.first or time.monotonic() - noted_s > NOTE_EVERY_S:
            writer.note(num_done)
            noted_s = time.monotonic()
            refuse_if_told(job.signals)
        activation = prefix_of(job, model, cut, batch).cpu()
        for i, index in enumerate(ids):
            row = activation[i]
            if has_length(rows, cut):
                assert rows.lengths is not None
                row = row[-rows.lengths[index] :] if pads_left(rows) else row[: rows.lengths[index]]
            writer.write(index, row)
        num_done += len(ids)
    writer.note(num_done)


def prefix_of(job: Job, model: nn.Module, cut: Cut, batch: dict[str, Any]) -> torch.Tensor:
    """What the tail reads of a batch's activation at the cut, fp32, (B, ...), in the job's precision."""
    with bf16_of(job.plan):
        return cut.read_part(run_prefix(model, cut, to_device(batch["inputs"], job.world.device))).float()


def _passes(job: Job, rows: Rows) -> list[NDArray[np.int64]]:
    """The rows of each pass through the prefix, of all ranks in turn: longest first, so that there is little padding.
    They are those of an evaluation, and the same at any world size, and so are the stored bits."""
    order = np.arange(rows.num_rows * num_views(job, rows))
    if rows.lengths is not None:
        order = np.argsort(-rows.lengths, kind="stable")
    return cut_rows(order, job.plan.batches.eval_batch_size, rows.lengths, rows.pass_tokens)


def layout_for(job: Job, cut: Cut, rows: Rows) -> Layout:
    """How the activations of a split lie in files that the ranks of this job write."""
    shape, size = cut.row_shape, job.world.world_size
    lengths = rows.lengths if has_length(rows, cut) else None
    piece = shape[1:] if lengths is not None else shape
    num_rows = rows.num_rows * num_views(job, rows)
    shard_of = np.zeros(num_rows, np.uint16)
    for number, ids in enumerate(_passes(job, rows)):
        shard_of[ids] = number % size
    return Layout(num_rows, tuple(piece), job.plan.spec.cache.dtype, size, lengths, shard_of)


def num_views(job: Job, rows: Rows) -> int:
    """Versions of each row: several where it is augmented."""
    return (job.plan.spec.cache.views or 1) if rows.pass_epoch else 1


def has_length(rows: Rows, cut: Cut) -> bool:
    """True where a row has one piece a token: (T, ...) of a text model."""
    return rows.lengths is not None and len(cut.at.shape) > 2 and not cut.reads_first_only


def pads_left(rows: Rows) -> bool:
    """True where the padding of a batch is on the left."""
    return getattr(rows.collate, "keywords", {}).get("padding_side") == "left"


def made_layouts(folder: Path) -> dict[str, Any]:
    """What `write_layout` returned for each split of an entry."""
    made: dict[str, Any] = json.loads((folder / META).read_text(encoding="utf-8"))["splits"]
    return made
