"""The measurements behind advice: a bounded sample of the data, and linear probes at several depths on it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dist_finetune.advise.logme import logme
from dist_finetune.data.arrow import column_values, select
from dist_finetune.data.split import sample
from dist_finetune.data.tables import Tables
from dist_finetune.features.depths import HEAD
from dist_finetune.features.heads import choose_c
from dist_finetune.features.job import ExtractionCost, FeatureJob
from dist_finetune.world import gather_objects, together

MAX_ROWS = {"text": 2000, "image": 1000}
ROWS_A_CLASS = 5  # what cross-validation in five folds needs
MAX_DEPTHS = 8
GRID = (1e-3, 1e-1)


@dataclass(frozen=True)
class Probe:
    """Cross-validated accuracy of multinomial logistic regression on the features of one depth."""

    depth: str
    word: str
    """The depth as `features.at` names it."""
    position: float
    """0 for the stem, 1 for the last block and the head."""
    accuracy: float
    standard_error: float
    logme: float


@dataclass(frozen=True)
class Evidence:
    """What was measured. Rows are those of the training split; probes saw `num_sampled` of them."""

    modality: str
    num_rows: int
    num_classes: int
    smallest_class: int
    median_class: float
    """Rows of the middle class: a mean would let one large class speak for many small ones."""
    largest_class: int
    num_sampled: int
    probes: tuple[Probe, ...]
    half_accuracy: float
    """Of the best depth with half of the sample: what more rows are worth."""
    seconds_a_row: float
    """One forward pass of one row on one rank."""

    @property
    def majority_share(self) -> float:
        """Accuracy of always naming the largest class."""
        return self.largest_class / self.num_rows

    @property
    def best(self) -> Probe:
        """The most accurate probe; of equals the deepest."""
        return max(self.probes, key=lambda probe: (probe.accuracy, probe.position))

    @property
    def last(self) -> Probe:
        """The better of the deepest probes: the last block and the head."""
        return max((p for p in self.probes if p.position == 1.0), key=lambda probe: probe.accuracy)


def sample_tables(tables: Tables, seed: int) -> Tables:
    """The same tables with at most MAX_ROWS training rows (more where there are many classes), in their class shares.

    Validation is cut to the same rows: probes use cross-validation, and nothing reads a validation row.
    """
    labels = column_values(tables.train, "label")
    limit = max(MAX_ROWS[tables.modality], ROWS_A_CLASS * len(tables.classes))
    rows = sample([b""] * len(labels), labels, limit, seed)
    train = select(tables.train, rows)
    return replace(tables, train=train, validation=train, test=None)


def depth_words(depth: int) -> tuple[str, ...]:
    """`features.at` for probes: all blocks of a shallow network, evenly spaced ones of a deep one, stem and head."""
    if depth <= MAX_DEPTHS:
        blocks: Sequence[int] = range(depth)
    else:
        blocks = sorted({round(i * (depth - 1) / (MAX_DEPTHS - 1)) for i in range(MAX_DEPTHS)})
    return ("stem", *map(str, blocks), "head") if depth else ("head",)


def measure(job: FeatureJob, labels: Sequence[int], cost: ExtractionCost) -> Evidence:
    """Probes at all depths of the job, dealt over the ranks; `labels` are those of all training rows. Collective."""
    num_rows = job.splits["train"].num_rows
    mine = job.depths[job.world.rank :: job.world.world_size]
    parts = gather_objects(together(lambda: {depth.label: _probe(job, depth.label, num_rows) for depth in mine}))
    found = {label: result for part in parts for label, result in part.items()}
    last_block = max((d.index for d in job.depths if d.index is not None), default=0)
    probes = tuple(
        Probe(
            depth=d.label,
            word=d.freeze_word,
            position=1.0 if d.label == HEAD else 0.0 if d.index is None else (d.index + 1) / (last_block + 1),
            accuracy=found[d.label][0],
            standard_error=float(np.sqrt(max(found[d.label][0] * (1 - found[d.label][0]), 1 / num_rows) / num_rows)),
            logme=found[d.label][1],
        )
        for d in job.depths
    )
    counts = np.bincount(labels, minlength=job.num_classes)
    best = max(probes, key=lambda probe: (probe.accuracy, probe.position))
    return Evidence(
        modality=job.plan.card.modality,
        num_rows=len(labels),
        num_classes=job.num_classes,
        smallest_class=int(counts.min()),
        median_class=float(np.median(counts)),
        largest_class=int(counts.max()),
        num_sampled=num_rows,
        probes=probes,
        half_accuracy=_half(job, best.depth, num_rows),
        seconds_a_row=cost.seconds / max(cost.num_rows, 1) * job.world.world_size,
    )


def _probe(job: FeatureJob, depth: str, num_rows: int) -> tuple[float, float]:
    features, labels = job.store.read("train", depth, num_rows)
    seed = job.plan.spec.train.seed
    accuracy = choose_c("softmax", features, labels, job.num_classes, None, seed, GRID)[1]
    return accuracy, logme(features, labels, job.num_classes)


def _half(job: FeatureJob, depth: str, num_rows: int) -> float:
    features, labels = job.store.read("train", depth, num_rows)
    seed = job.plan.spec.train.seed
    rows = sample([b""] * num_rows, labels.tolist(), max(num_rows // 2, job.num_classes), seed)
    return choose_c("softmax", features[rows], labels[rows], job.num_classes, None, seed, GRID)[1]
