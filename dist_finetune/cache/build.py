"""Fills the store: every row once through the frozen prefix, dealt over the ranks; or finds an earlier run's."""

import hashlib
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from dist_finetune.cache.cut import Cut, NoCut, find_cut, make_tail, run_prefix
from dist_finetune.cache.entries import META, cache_root, hash_of, make_room, touch
from dist_finetune.cache.rows import CachedCollate, CachedRows
from dist_finetune.cache.store import Layout, ShardWriter, StoredRows, layout_json
from dist_finetune.data.loading import Rows
from dist_finetune.data.text import TextRows
from dist_finetune.evaluate import to_device
from dist_finetune.freeze import train_mode
from dist_finetune.job import Job
from dist_finetune.models.sources import forward_logits
from dist_finetune.phases import PhasePlan
from dist_finetune.run_folder import write_json
from dist_finetune.stopping import told_to_stop
from dist_finetune.tasks.task import counted
from dist_finetune.world import on_first, patience, together

if TYPE_CHECKING:
    from dist_finetune.data.images import ImageRows

AGREEMENT = {"fp32": 1e-4, "bf16": 3e-2}  # of logits, relative: a CNN differs by up to 3e-5 at another batch size
PROBE_ROWS = 4
NOTE_EVERY_S = 30.0  # what a killed run may have to compute again


def cache_splits(
    job: Job, phase: PhasePlan, model: nn.Module, frozen_digests: dict[str, str]
) -> tuple[dict[str, Rows], Cut]:
    """Cached rows of every split, and the cut; `model`, frozen and whole, is turned into its tail. Collective.

    Raises NoCut, with the model as it was, where it can't be cut or the tail does not give the whole model's logits.
    """
    job.report.say("caching the frozen part's activations")
    started = time.perf_counter()
    model.to(job.world.device)
    probe = job.splits["train"].first_batch(PROBE_ROWS)["inputs"]
    train_mode(model, phase.manifest)
    cut = find_cut(model, to_device(probe, job.world.device))
    model.eval()
    key, source = _key(job, cut, frozen_digests)
    layouts = {name: _layout(job, model, cut, rows) for name, rows in job.splits.items()}
    folder = cache_root(job.plan.spec) / key
    reused = on_first(job.world, lambda: (folder / META).exists())
    if not reused:
        with patience():  # a pass over all data, in which no step is taken
            _build(job, model, cut, layouts, folder, source)
    cached = {name: _rows(job, folder, name, layouts[name]) for name in job.splits}
    on_first(job.world, lambda: touch(folder))
    _check_agreement(job, model, cut, cached["train"])
    size = sum(layout.num_bytes for layout in layouts.values()) / 2**20
    what = "reused" if reused else f"built in {time.perf_counter() - started:.1f} s"
    job.report.say(f"cache {what}: {size:,.0f} MiB at {cut.at.path}, {folder}")
    return cached, cut


def _build(
    job: Job, model: nn.Module, cut: Cut, layouts: dict[str, Layout], folder: Path, source: dict[str, Any]
) -> None:
    """Fills a hidden folder, which gets its name when it is complete. A run that was ended goes on where it was; two
    that fill the same write the same."""
    part = folder.with_name(f".{folder.name}.{job.world.world_size}")

    def begin() -> None:
        needed = sum(layout.num_bytes for layout in layouts.values())
        folder.parent.mkdir(parents=True, exist_ok=True)
        make_room(folder.parent, needed, job.plan.spec.cache.quota)
        missing = needed - sum(512 * path.stat().st_blocks for path in part.glob("*"))
        free = shutil.disk_usage(folder.parent).free
        if free < missing * 1.02:
            raise NoCut(f"{folder.parent} has {free / 2**20:,.0f} MiB free, the cache needs {missing / 2**20:,.0f} MiB")
        part.mkdir(exist_ok=True)

    seconds: dict[str, float] = {}

    def fill() -> None:
        for name, rows in job.splits.items():
            started = time.perf_counter()
            _fill(job, model, cut, rows, ShardWriter(part, name, job.world.rank, layouts[name]))
            seconds[name] = round(time.perf_counter() - started, 3)

    def publish() -> None:
        shapes = {name: layout_json(layout) for name, layout in layouts.items()}
        told = {"source": job.plan.card.name, "made_from": source, "splits": shapes, "seconds": seconds}
        if not folder.exists():  # another job may have been faster
            write_json(part / META, told)
            part.rename(folder)
        shutil.rmtree(part, ignore_errors=True)

    on_first(job.world, begin)
    model.to(memory_format=torch.channels_last)  # only until it is sharded: ZeRO lays weights end to end
    together(fill)
    model.to(memory_format=torch.contiguous_format)
    on_first(job.world, publish)


def _fill(job: Job, model: nn.Module, cut: Cut, rows: Rows, writer: ShardWriter) -> None:
    """This rank's rows of a split through the prefix, longest first so that batches have little padding.

    Raises Stopped where the run is told to stop.
    """
    mine = np.arange(job.world.rank, rows.num_rows * _num_views(job, rows), job.world.world_size)
    if rows.lengths is not None:
        mine = mine[np.argsort(-rows.lengths[mine], kind="stable")]
    size, num_done, noted_s = job.plan.batches.eval_batch_size, writer.num_done, time.monotonic()
    batches = [mine[i : i + size].tolist() for i in range(num_done, len(mine), size)]
    keys = [[(i // rows.num_rows, i % rows.num_rows) for i in ids] if rows.pass_epoch else ids for ids in batches]
    loader = DataLoader(rows.dataset, batch_sampler=keys, collate_fn=rows.collate, num_workers=rows.num_workers)
    for ids, batch in zip(batches, loader, strict=True):
        if job.signals.first or time.monotonic() - noted_s > NOTE_EVERY_S:
            writer.note(num_done)
            noted_s = time.monotonic()
            if job.signals.first:
                raise told_to_stop(job.signals.first.name)
        with torch.autocast(job.world.device.type, torch.bfloat16, enabled=job.plan.precision == "bf16"):
            activation = run_prefix(model, cut, to_device(batch["inputs"], job.world.device)).float().cpu()
        for i, index in enumerate(ids):
            row = activation[i]
            if _has_length(rows, cut):
                assert rows.lengths is not None
                row = row[-rows.lengths[index] :] if _pads_left(rows) else row[: rows.lengths[index]]
            writer.write(index, row)
        num_done += len(ids)
    writer.note(num_done)


def _layout(job: Job, model: nn.Module, cut: Cut, rows: Rows) -> Layout:
    shape = cut.at.shape[1:]
    lengths = rows.lengths if _has_length(rows, cut) else None
    piece = shape[1:] if lengths is not None else shape
    num_rows = rows.num_rows * _num_views(job, rows)
    return Layout(num_rows, tuple(piece), job.plan.spec.cache.dtype, job.world.world_size, lengths)


def _num_views(job: Job, rows: Rows) -> int:
    """Versions of each row: several where it is augmented."""
    return (job.plan.spec.cache.views or 1) if rows.pass_epoch else 1


def _has_length(rows: Rows, cut: Cut) -> bool:
    """True where an activation has one piece a token: (B, T, ...) of a text model."""
    return rows.lengths is not None and len(cut.at.shape) > 2


def _pads_left(rows: Rows) -> bool:
    return getattr(rows.collate, "keywords", {}).get("padding_side") == "left"


def _rows(job: Job, folder: Path, name: str, layout: Layout) -> Rows:
    rows = job.splits[name]
    made = json.loads((folder / META).read_text(encoding="utf-8"))["splits"][name]
    layout = replace(layout, num_shards=made["num_shards"])
    is_text = isinstance(rows.dataset, TextRows)
    collate = CachedCollate(
        StoredRows(folder, name, layout), layout, rows.collate if is_text else None, _pads_left(rows)
    )
    dataset = CachedRows(rows.dataset, is_text, _num_views(job, rows))
    return replace(rows, dataset=dataset, collate=collate, num_workers=0)


def _check_agreement(job: Job, model: nn.Module, cut: Cut, cached: Rows) -> None:
    """The first rows both ways, in eval mode: the whole model, and its tail from what is stored. Makes the tail."""
    device, precision = job.world.device, job.plan.precision
    batch = job.splits["train"].first_batch(PROBE_ROWS)
    whole_inputs = to_device(batch["inputs"], device)
    tail_inputs = to_device(cached.first_batch(PROBE_ROWS)["inputs"], device)
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        # padding has logits of its own where words are tagged; nothing reads them, and none are stored
        whole, _ = counted(forward_logits(model, whole_inputs).float().cpu(), batch["labels"])
        undo = make_tail(model, cut)
        try:
            tail, _ = counted(forward_logits(model, tail_inputs).float().cpu(), batch["labels"])
            difference = ((whole - tail).abs().max() / whole.abs().max().clamp(min=1e-12)).item()
            problem = f"its logits would differ by {difference:.1e}"
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
            difference, problem = float("inf"), f"the rest can't run alone: {str(error).splitlines()[0]}"
    is_coarse = "bf16" in (precision, job.plan.spec.cache.dtype)
    if difference > AGREEMENT["bf16" if is_coarse else "fp32"]:
        undo()
        raise NoCut(f"cut after {cut.at.path}, {problem}")


def _key(job: Job, cut: Cut, frozen_digests: dict[str, str]) -> tuple[str, dict[str, Any]]:
    """Short hash of all that decides what is stored, and what went into it."""
    encoded = {name: _encoding(rows, job.plan.spec.cache.views) for name, rows in job.splits.items()}
    source = {
        "prefix": hash_of(sorted((name, frozen_digests.get(name)) for name in cut.dropped)),
        "cut": cut.at.path,
        "data": job.plan.data.fingerprint,
        "encoded": encoded,
        "precision": job.plan.precision,
        "dtype": job.plan.spec.cache.dtype,
    }
    return hash_of(source)[:20], source


def _encoding(rows: Rows, views: int | None) -> str:
    """What the prefix reads of a split: a hash of the token numbers, or how images are transformed."""
    if isinstance(rows.dataset, TextRows):
        return hashlib.sha256(rows.dataset.input_ids.tobytes() + rows.dataset.offsets.tobytes()).hexdigest()
    images = cast("ImageRows", rows.dataset)
    return hash_of([repr(images.image_input), rows.num_rows, images.augment and [images.seed, views]])
