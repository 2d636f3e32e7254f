"""Encoded rows of a split together with how they make batches, and the loader that feeds one rank's steps."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from dist_finetune.data import batches
from dist_finetune.data.batches import MicroBatch, StepBatch
from dist_finetune.tasks.names import TaskName
from dist_finetune.world import World

Batch = dict[str, Any]


@dataclass(frozen=True)
class Rows:
    """One split: a map-style dataset, its collate function, tokens per row (None for images), what its labels are."""

    dataset: Dataset[Any]
    collate: Callable[[list[Any]], Batch]
    lengths: NDArray[np.int32] | None
    pass_epoch: bool = False
    num_workers: int = 0
    task: TaskName = "classification"
    classes: tuple[str, ...] = ()
    num_targets: NDArray[np.int64] | None = None
    """Targets of each row that a loss counts; None: one each."""

    @property
    def num_rows(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def first_batch(self, num_rows: int = 2) -> Batch:
        """The first rows as one collated batch."""
        steps = [StepBatch(0, 0, num_rows, (MicroBatch(np.arange(min(num_rows, self.num_rows)), False),), True)]
        keys = next(iter(_Keys(steps, self.pass_epoch)))
        return self.collate([self.dataset[key] for key in keys])

    def evaluation_batches(self, batch_size: int, world: World) -> list[MicroBatch]:
        """This rank's evaluation batches; see `batches.evaluation_batches`."""
        return batches.evaluation_batches(self.num_rows, batch_size, world.rank, world.world_size, self.lengths)

    def training_batches(self, steps: Sequence[StepBatch]) -> Iterator[Batch]:
        """The collated micro-batches of `steps`, in order. Augmented images are drawn for (epoch, row)."""
        return iter(
            DataLoader(
                self.dataset,
                batch_sampler=_Keys(steps, self.pass_epoch),
                collate_fn=self.collate,
                num_workers=self.num_workers,
                pin_memory=self.num_workers > 0,
                prefetch_factor=4 if self.num_workers else None,
            )
        )


@dataclass(frozen=True)
class _Keys:
    """Dataset keys of each micro-batch, made as the loader asks for them."""

    steps: Sequence[StepBatch]
    pass_epoch: bool

    def __iter__(self) -> Iterator[list[Any]]:
        for step in self.steps:
            for micro in step.micro_batches:
                ids = micro.ids.tolist()
                yield [(step.epoch, i) for i in ids] if self.pass_epoch else ids
