"""Training rows from stored activations: an entry that is there, or is filled now; proved before it is used."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from dist_finetune.cache.cut import (
    ACTIVATION,
    CANNOT_RUN_ALONE,
    Cut,
    NoCut,
    NotWorth,
    find_cut,
    make_tail,
    reads_first_only,
    run_prefix,
)
from dist_finetune.cache.entries import META, cache_root, hash_of, touch
from dist_finetune.cache.fill import (
    Entry,
    fill_once,
    has_length,
    layout_for,
    made_layouts,
    num_views,
    pads_left,
    prefix_of,
    require_seen,
)
from dist_finetune.cache.rows import CachedCollate, CachedRows
from dist_finetune.cache.store import FORMAT, TORCH_TYPES, Layout, StoredRows, read_layout
from dist_finetune.cache.worth import SAVED_S, SLOW_DISK, Worth, disk_speed, weigh
from dist_finetune.data.loading import Batch, Rows
from dist_finetune.data.text import TextRows
from dist_finetune.engine.base import Inputs
from dist_finetune.engine.precision import autocast_of, bf16_of
from dist_finetune.evaluate import to_device
from dist_finetune.freeze import train_mode
from dist_finetune.job import Job
from dist_finetune.models.sources import forward_logits
from dist_finetune.phases import PhasePlan
from dist_finetune.spec import SHARDED_WEIGHTS
from dist_finetune.tasks.task import counted
from dist_finetune.world import on_first, settled_s, together

if TYPE_CHECKING:
    from dist_finetune.data.images import ImageRows

AGREEMENT = {"fp32": 1e-4, "tf32": 3e-3, "bf16": 3e-2}
"""Of logits, relative: a CNN differs by up to 3e-5 at another batch size. GPUs round to TF32 (5e-4) in convolutions."""
PROBE_ROWS = 4


def cache_splits(
    job: Job, phase: PhasePlan, model: nn.Module, frozen_digests: dict[str, str], is_begun: bool
) -> tuple[dict[str, Rows], Cut, str]:
    """Cached rows of every split, the cut, and words for what was stored or found; `model`, frozen and whole, is turned
    into its tail. Collective.

    A phase that `is_begun` goes on with its cache, whatever the disk's speed is now. Raises NoCut, with the model as it
    was, where it can't be cut or the tail does not give the whole model's logits; NotWorth where `auto` finds that it
    does not pay.
    """
    job.report.say("caching the frozen part's activations")
    started = time.perf_counter()
    probe = job.splits["train"].first_batch(PROBE_ROWS)
    cut = together(lambda: _cut_on_device(job, phase, model, probe))
    model.eval()
    cut = replace(cut, reads_first_only=on_first(job.world, lambda: _reads_first_only(job, model, cut, probe)))
    if job.plan.strategy in SHARDED_WEIGHTS:  # they may gather in a module that a chain leaves out
        cut = replace(cut, chain=())
    key, source = _key(job, cut, frozen_digests)
    layouts = {name: layout_for(job, cut, rows) for name, rows in job.splits.items()}
    entry = Entry(cache_root(job.plan.spec) / key, source, layouts)
    is_reused = on_first(job.world, lambda: entry.is_there())
    whole = together(lambda: _logits(job, model, probe))
    if not is_reused:
        fed = together(lambda: {**probe, "inputs": _fed(job, model, cut, probe)})
        _agreeing_tail(job, model, cut, whole, fed)()  # undone: the whole model fills
        if job.plan.spec.cache.mode == "auto" and not is_begun:
            _require_worth(job, phase, model, cut, entry, probe)
        is_reused = fill_once(job, model, cut, entry)
    together(lambda: require_seen(entry.folder / META))
    cached = together(lambda: _open(job, cut, entry))
    on_first(job.world, lambda: touch(entry.folder))
    stored = together(lambda: cached["train"].first_batch(PROBE_ROWS))
    _agreeing_tail(job, model, cut, whole, stored)
    what = "reused" if is_reused else f"built in {time.perf_counter() - started:.1f} s"
    where = f"the first token at {cut.at.path}" if cut.reads_first_only else cut.at.path
    told = f"{what}: {entry.num_bytes / 2**20:,.0f} MiB of {where}, {entry.folder}"
    job.report.say(f"cache {told}")
    return cached, cut, told


def _cut_on_device(job: Job, phase: PhasePlan, model: nn.Module, batch: dict[str, Any]) -> Cut:
    """The cut, with the whole model on this rank's device. Raises NoCut where that has no room for it: under zero3 and
    fsdp a model need not fit."""
    if job.plan.is_larger_than_device:
        raise NoCut("the whole model, which fills it, is larger than a GPU")
    try:
        model.to(job.world.device)
        train_mode(model, phase.manifest)
        with autocast_of(job.plan)():
            return find_cut(model, to_device(batch["inputs"], job.world.device))
    except torch.OutOfMemoryError:
        model.to("cpu")
        raise NoCut("the whole model, which fills it, finds no room on a GPU") from None


def _require_worth(job: Job, phase: PhasePlan, model: nn.Module, cut: Cut, entry: Entry, probe: Batch) -> None:
    """Says why the cache pays, from what the first rank measures. Raises NotWorth where it does not. Collective.

    `probe` is enough to tell how long a row takes on a CPU. A GPU would spend more on starting the pass: it gets a full
    one, and another before, as the first of its size is slower.
    """
    num_bytes, root = entry.num_bytes, entry.folder.parent
    passes = phase.num_steps / job.plan.batches.steps_per_epoch
    rows, device = job.splits["train"], job.world.device
    on_cpu = device.type == "cpu"

    def measure() -> Worth:
        batch = probe if on_cpu else rows.first_batch(job.plan.batches.eval_batch_size)
        inputs = to_device(batch["inputs"], device)
        with autocast_of(job.plan)():  # as the training that is spared would run
            if not on_cpu:
                run_prefix(model, cut, inputs)
            started = settled_s(device)
            run_prefix(model, cut, inputs)
            row_s = (settled_s(device) - started) / len(batch["labels"])
        prefix_s = row_s * rows.num_rows / job.world.world_size
        worth = weigh(passes, prefix_s, num_bytes, SLOW_DISK, SLOW_DISK)
        if worth.is_settled:
            return worth
        try:
            root.mkdir(parents=True, exist_ok=True)
            return weigh(passes, prefix_s, num_bytes, *disk_speed(root, num_bytes))
        except OSError as error:
            raise NoCut(f"{root} can't be written: {error.strerror}") from None

    worth = on_first(job.world, measure)
    if not worth.is_kept:
        little = f"{worth.saved_s:.2g} s is all that it would spare: " if worth.saved_s < SAVED_S else ""
        raise NotWorth(f"it would not pay: {little}{worth.reason} (cache: on keeps it all the same)")
    job.report.say(f"cache: {worth.reason}")


def _open(job: Job, cut: Cut, entry: Entry) -> dict[str, Rows]:
    """The rows of each split. Raises NoCut where the entry is damaged, as by a disk that lost power."""
    try:
        return {name: _rows(job, cut, entry.folder, name, layout) for name, layout in entry.layouts.items()}
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise NoCut(f"{entry.folder} is damaged ({_first_line(error)}); delete it to have it filled anew") from None


def _rows(job: Job, cut: Cut, folder: Path, name: str, layout: Layout) -> Rows:
    rows = job.splits[name]
    layout = read_layout(folder, name, layout, made_layouts(folder)[name])
    is_text = isinstance(rows.dataset, TextRows)
    reads_text = is_text and not (cut.chain and layout.lengths is None)
    stored = StoredRows(folder, name, layout)
    collate = CachedCollate(stored, layout, is_text, rows.collate if reads_text else None, pads_left(rows))
    dataset = CachedRows(rows.dataset, reads_text, num_views(job, rows))
    return replace(rows, dataset=dataset, collate=collate, num_workers=0)


def _reads_first_only(job: Job, model: nn.Module, cut: Cut, batch: dict[str, Any]) -> bool:
    rows, inputs = job.splits["train"], to_device(batch["inputs"], job.world.device)
    if not isinstance(inputs, dict) or not has_length(rows, cut):
        return False
    is_one = cut.at.shape[1] == 1  # the last block computes no other
    if pads_left(rows):
        if is_one:
            raise NoCut("texts are padded on the left, and the head reads what stands there")
        return False
    if is_one:
        return True
    activation = prefix_of(job, model, cut, batch)
    with bf16_of(job.plan):
        return reads_first_only(model, cut, {**inputs, ACTIVATION: activation})


def _fed(job: Job, model: nn.Module, cut: Cut, batch: dict[str, Any]) -> Inputs:
    """What the tail would be given for a batch: its activation, rounded and without padding as the store has it."""
    inputs, stored = to_device(batch["inputs"], job.world.device), TORCH_TYPES[job.plan.spec.cache.dtype]
    activation = prefix_of(job, model, cut, batch).to(stored).float()
    if not isinstance(inputs, dict):
        return activation
    if activation.dim() > 2 and not cut.reads_first_only:
        mask = inputs["attention_mask"].bool()
        activation = activation * mask.view(*mask.shape, *(1 for _ in activation.shape[2:]))
    return {**inputs, ACTIVATION: activation}


def _logits(job: Job, model: nn.Module, batch: Batch) -> torch.Tensor:
    """Logits (M, C) in eval mode, on the CPU in fp32; where words are tagged without those of padding, which nothing
    reads, and none are stored."""
    with torch.inference_mode(), bf16_of(job.plan):
        logits = forward_logits(model, to_device(batch["inputs"], job.world.device)).float().cpu()
    return counted(logits, batch["labels"])[0]


def _agreeing_tail(job: Job, model: nn.Module, cut: Cut, whole: torch.Tensor, batch: Batch) -> Callable[[], None]:
    """Makes the tail and returns what undoes it, once it has given, for a batch of its own inputs, the logits of the
    `whole` model. Raises NoCut, with the model as it was, where they differ. Collective."""
    device, precision = job.world.device, job.plan.precision
    undo: list[Callable[[], None]] = []

    def compare() -> None:
        undo.append(make_tail(model, cut))
        try:
            tail = _logits(job, model, batch)
        except CANNOT_RUN_ALONE as error:
            raise NoCut(f"cut after {cut.at.path}, the rest can't run alone: {_first_line(error)}") from None
        difference = ((whole - tail).abs().max() / whole.abs().max().clamp(min=1e-12)).item()
        exact = "tf32" if device.type == "cuda" and torch.backends.cudnn.allow_tf32 else "fp32"
        is_coarse = "bf16" in (precision, job.plan.spec.cache.dtype)
        if not difference <= AGREEMENT["bf16" if is_coarse else exact]:
            raise NoCut(f"cut after {cut.at.path}, its logits would differ by {difference:.1e}")

    try:
        together(compare)  # one rank's problem is everybody's
    except NoCut:
        for back in undo:
            back()
        raise
    return undo[0]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _key(job: Job, cut: Cut, frozen_digests: dict[str, str]) -> tuple[str, dict[str, Any]]:
    """Short hash of all that decides what is stored, and what went into it."""
    encoded = {name: _encoding(rows, job.plan.spec.cache.views) for name, rows in job.splits.items()}
    source = {
        "format": FORMAT,
        "prefix": hash_of(sorted((name, frozen_digests.get(name)) for name in cut.dropped)),
        "cut": cut.at.path,
        "positions": "first" if cut.reads_first_only else "all",
        "data": job.plan.data.fingerprint,
        "encoded": encoded,
        "precision": job.plan.precision,
        "dtype": job.plan.spec.cache.dtype,
    }
    return hash_of(source)[:20], source


def _encoding(rows: Rows, views: int | None) -> str:
    """What the prefix reads of a split: a hash of the tokens, or how images are transformed."""
    if isinstance(rows.dataset, TextRows):
        return rows.dataset.sha256
    images = cast("ImageRows", rows.dataset)
    return hash_of([repr(images.image_input), rows.num_rows, images.augment and [images.seed, views]])
