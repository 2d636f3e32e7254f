"""Encoded rows of a split together with how they make batches, and the loader that feeds one rank's steps."""

import queue
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from dist_finetune.data import batches
from dist_finetune.data.batches import MicroBatch, StepBatch
from dist_finetune.signals import SIGNALS
from dist_finetune.tasks.names import TaskName
from dist_finetune.world import World

Batch = dict[str, Any]
NUM_AHEAD = 4
"""Batches that are ready before they are asked for: a worker's, or where there is none those of a thread on a GPU."""


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
    pass_tokens: int | None = None
    """Tokens that a pass without gradients takes at most, padding among them; None: its rows alone are counted."""

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
        return batches.evaluation_batches(
            self.num_rows, batch_size, world.rank, world.world_size, self.lengths, self.pass_tokens
        )

    def training_batches(self, steps: Sequence[StepBatch]) -> Iterator[Batch]:
        """The collated micro-batches of `steps`, in order. Augmented images are drawn for (epoch, row)."""
        return self.batches_of(_Keys(steps, self.pass_epoch))

    def batches_of(self, keys: Iterable[list[Any]]) -> Iterator[Batch]:
        """The collated batches of lists of dataset keys, in order; for a GPU in pinned memory, and made ahead."""
        for_gpu = torch.cuda.is_available()
        loader = DataLoader(
            self.dataset,
            batch_sampler=keys,
            collate_fn=self.collate,
            num_workers=self.num_workers,
            worker_init_fn=_hear_no_signals,
            pin_memory=for_gpu,
            prefetch_factor=NUM_AHEAD if self.num_workers else None,
            # each start of a loader draws a number, on a GPU in mid-step: from the model's a resumed run would not
            generator=torch.Generator(),
        )
        return ahead(loader, torch.cuda.current_device()) if for_gpu and not self.num_workers else iter(loader)


def _hear_no_signals(worker: int) -> None:
    """For a loader process. torchrun sends signals to all processes of a rank: one that SIGTERM ends would have torch
    raise an error in the rank, before it has saved; and others it would write into the pipe by which the rank hears of
    them (signals.py), as forks share it. It ends with its loader, or its rank."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def ahead(batches: Iterable[Batch], device: int | None = None, num_ahead: int = NUM_AHEAD) -> Iterator[Batch]:
    """`batches`, in order, made by a thread that is up to `num_ahead` of them ahead; what it raises is raised here.

    The thread pins memory for the GPU number `device`. It ends with the batches, or with who iterates over them.
    """
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(num_ahead)
    over = threading.Event()

    def put(kind: str, value: Any) -> None:
        while not over.is_set():
            with suppress(queue.Full):
                ready.put((kind, value), timeout=0.1)
                return

    def make() -> None:
        try:
            if device is not None:
                torch.cuda.set_device(device)
            for batch in batches:
                put("batch", batch)
                if over.is_set():
                    return
            put("end", None)
        except Exception as error:
            put("error", error)

    threading.Thread(target=make, name="batches", daemon=True).start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value
    finally:
        over.set()


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
