"""What the stages of a feature run share, made from a spec: plan, model, depths, rows and the store they go to."""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from dist_finetune.cache.tokens import encode_once
from dist_finetune.data.arrow import column_values
from dist_finetune.data.loading import Rows
from dist_finetune.data.tables import Tables
from dist_finetune.data.text import TextRows
from dist_finetune.data.together import read_tables_together
from dist_finetune.features.bare import without_training
from dist_finetune.features.depths import Capture, Depth, find_depths
from dist_finetune.features.extract import extract_split
from dist_finetune.features.heads import require_rows
from dist_finetune.features.store import FeatureKey, Store, key_value
from dist_finetune.models.card import Provenance
from dist_finetune.models.sources import load_tokenizer
from dist_finetune.plan import Plan, plan_run
from dist_finetune.report import PLAIN_LINE_EVERY_S, Reporter
from dist_finetune.spec import Spec
from dist_finetune.stage import load_base
from dist_finetune.tasks.names import require_classification
from dist_finetune.topology import job_topology
from dist_finetune.world import World, gather_objects, on_first, require_same, together

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CUDA_BATCH_SIZE = 128


@dataclass(frozen=True)
class FeatureJob:
    """A feature run on this rank. The model is in eval mode, on the rank's device, whole."""

    plan: Plan
    world: World
    report: Reporter
    folder: Path
    splits: dict[str, Rows]
    tokenizer: "PreTrainedTokenizerBase | None"
    model: nn.Module
    provenance: Provenance
    depths: tuple[Depth, ...]
    store: Store

    @property
    def num_classes(self) -> int:
        return len(self.plan.data.classes)


@dataclass(frozen=True)
class ExtractionCost:
    """Rows that all ranks computed (those found on disk left out) and the seconds of the slowest rank."""

    num_rows: int
    seconds: float

    @property
    def samples_per_s(self) -> float:
        return self.num_rows / self.seconds if self.seconds else 0.0


def class_tables(spec: Spec, what: str, world: World) -> Tables:
    """The splits of a spec, as `read_tables` gives them. Raises UserError where `what`, which compares classes, is
    asked of data without any, or with too few rows of them. Collective."""
    tables = read_tables_together(spec.data, spec.train.seed, spec.label_task, world)

    def require_classes() -> None:
        require_classification(tables.task, what, tables.columns.label)
        require_rows(column_values(tables.train, "label"))

    together(require_classes)
    return tables


def prepare_features(spec: Spec, tables: Tables, folder: Path, world: World, report: Reporter) -> FeatureJob:
    """Everything that extraction needs; its features go to `folder`/features. Collective."""
    plan = plan_run(without_training(spec, world.world_size), job_topology(world), tables)
    require_same("the plan", plan.digest(), "Give every rank the same config, data and package versions.")
    tokenizer = together(lambda: load_tokenizer(plan.card)) if plan.card.modality == "text" else None
    splits = encode_once(plan, tables, tokenizer, world)
    model, provenance = load_base(plan, world, report)
    model.requires_grad_(False).eval().to(world.device)
    model.to(memory_format=torch.channels_last)
    depths = find_depths(spec.features.at, plan.structure, model)
    _try_out(model, plan, depths, splits["train"], world)
    key = _key(spec, plan, provenance, splits, depths)
    return FeatureJob(
        plan=plan,
        world=world,
        report=report,
        folder=folder,
        splits=splits,
        tokenizer=tokenizer,
        model=model,
        provenance=provenance,
        depths=depths,
        store=Store(folder / "features" / key.digest, key),
    )


def extract_all(job: FeatureJob, check: Callable[[], None] = lambda: None) -> ExtractionCost:
    """Features of all splits at all depths, on disk; what an earlier, interrupted run left is not computed again.

    `check` is called before each shard, as often on every rank; it may raise to end the extraction. Collective.
    """
    on_first(job.world, job.store.open)
    started_s = time.perf_counter()
    num_done, pool = 0, job.plan.spec.features.pool
    with Capture(job.model, job.plan.structure, job.depths, pool) as capture:
        for split, rows in job.splits.items():
            tell = _progress(job.report, split, rows.num_rows, job.world.world_size, check)
            autocast = job.plan.precision == "bf16"
            num_done += extract_split(split, rows, capture, job.store, job.world, autocast, tell)
    return ExtractionCost(num_done, max(gather_objects(time.perf_counter() - started_s)))


def _try_out(model: nn.Module, plan: Plan, depths: tuple[Depth, ...], rows: Rows, world: World) -> None:
    """Runs two rows, so that a depth or pooling that can't work is told before hours of extraction."""

    def run() -> None:
        with Capture(model, plan.structure, depths, plan.spec.features.pool) as capture:
            capture.features(rows.first_batch(), world.device)

    together(run)


def _key(
    spec: Spec, plan: Plan, provenance: Provenance, splits: dict[str, Rows], depths: tuple[Depth, ...]
) -> FeatureKey:
    asked, planned = spec.train.eval_batch_size, plan.batches.eval_batch_size  # the plan's own spec has no `train`
    if plan.topology.device == "cuda":  # twice what memory bounds an evaluation to, beside which a model is trained
        planned = min(CUDA_BATCH_SIZE, 2 * planned)
    return FeatureKey(
        weights_sha256=provenance.sha256,
        inputs_sha256=_inputs_sha256(plan, splits),
        transform=key_value(plan.card.image or plan.data.max_length),
        depths=tuple(depth.label for depth in depths),
        pool=spec.features.pool,
        precision=plan.precision,
        batch_size=planned if asked == "auto" else asked,
        pass_tokens=splits["train"].pass_tokens,
    )


def _inputs_sha256(plan: Plan, splits: dict[str, Rows]) -> str:
    """The data's fingerprint together with the tokens, which another tokenizer would change."""
    total = hashlib.sha256(plan.data.fingerprint.encode())
    for rows in splits.values():
        if isinstance(rows.dataset, TextRows):
            total.update(rows.dataset.sha256.encode())
    return total.hexdigest()


def _progress(
    report: Reporter, split: str, num_rows: int, world_size: int, check: Callable[[], None]
) -> Callable[[int], None]:
    """Calls `check`, and says how far extraction is every few seconds."""
    last_s = time.monotonic()

    def tell(num_done: int) -> None:
        nonlocal last_s
        check()
        if time.monotonic() - last_s > PLAIN_LINE_EVERY_S:
            last_s = time.monotonic()
            report.say(f"{split}: features of about {min(num_rows, num_done * world_size):,} of {num_rows:,} rows")

    return tell
