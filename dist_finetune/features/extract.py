"""Extraction over all ranks: every row on exactly one of them, in batches that don't depend on how many there are."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_finetune.data.batches import evaluation_batches
from dist_finetune.data.loading import Rows
from dist_finetune.features.depths import Capture
from dist_finetune.features.store import Store
from dist_finetune.world import World, on_first, together

SHARDS_A_SPLIT = 32  # enough to deal evenly to many ranks; large splits get more
MAX_BATCHES_A_SHARD = 64


@dataclass(frozen=True)
class Shard:
    """Some batches of a split, as row numbers."""

    number: int
    batches: tuple[NDArray[np.int64], ...]

    @property
    def ids(self) -> NDArray[np.int64]:
        return np.concatenate(self.batches)


def plan_shards(rows: Rows, batch_size: int) -> list[Shard]:
    """The shards of a split: a function of its rows and the batch size alone."""
    cut = evaluation_batches(rows.num_rows, batch_size, 0, 1, rows.lengths, rows.pass_tokens)
    batches = [micro.ids for micro in cut]
    size = min(MAX_BATCHES_A_SHARD, max(1, len(batches) // SHARDS_A_SPLIT))
    cuts = range(0, len(batches), size)
    return [Shard(number, tuple(batches[start : start + size])) for number, start in enumerate(cuts)]


def extract_split(
    split: str,
    rows: Rows,
    capture: Capture,
    store: Store,
    world: World,
    autocast: bool,
    between: Callable[[int], None] = lambda num_rows: None,
) -> int:
    """Computes and writes the shards of a split that are not there yet; returns their rows over all ranks. Collective.

    Before each shard `between` is called, as often on every rank, with the rows this rank did so far; it may raise
    to end the extraction.
    """
    shards = plan_shards(rows, store.key.batch_size)
    pending = on_first(world, lambda: [s.number for s in shards if not store.holds(split, s.number, s.ids)])
    mine = [shards[number] for number in pending[world.rank :: world.world_size]]
    batches = _batches(rows, mine)
    done = 0
    for turn in range(-(-len(pending) // world.world_size)):
        between(done)
        if turn < len(mine):
            store.write(split, mine[turn].number, _features(mine[turn], batches, capture, world, autocast))
            done += len(mine[turn].ids)
    together(lambda: None)  # nobody reads before everybody has written
    return sum(len(shards[number].ids) for number in pending)


def _features(
    shard: Shard, batches: Iterator[dict[str, Tensor]], capture: Capture, world: World, autocast: bool
) -> dict[str, Tensor]:
    parts: dict[str, list[Tensor]] = {}
    for _ in shard.batches:
        batch = next(batches)
        with torch.autocast(world.device.type, torch.bfloat16, enabled=autocast):
            features = capture.features(batch, world.device)
        for name, values in {**features, "labels": batch["labels"]}.items():
            parts.setdefault(name, []).append(values)
    return {"ids": torch.from_numpy(shard.ids)} | {name: torch.cat(values) for name, values in parts.items()}


def _batches(rows: Rows, shards: list[Shard]) -> Iterator[dict[str, Tensor]]:
    """One loader over all shards, so that its workers and its prefetching span them."""
    return rows.batches_of([ids.tolist() for shard in shards for ids in shard.batches])
