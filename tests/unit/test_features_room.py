"""What of features is held at once: a batch's tokens while they are computed, all rows while a head is fitted."""

from pathlib import Path

import numpy as np
import pytest

from dist_finetune.data.loading import Rows
from dist_finetune.features.extract import plan_shards
from dist_finetune.features.room import available_bytes, fits


def test_features_beyond_memory_are_not_fitted_in_memory() -> None:
    """10,000 rows of 4,096 features are 0.33 GB in float64, three times that while a head is fitted."""
    assert fits(10_000, 4_096, 1, 10**9)
    assert not fits(10_000, 4_096, 2, 10**9)
    assert not fits(40_000, 4_096, 1, 10**9)


@pytest.mark.parametrize(("limit", "expected"), [("max", 8 * 2**20), ("3145728", 2 * 2**20), (None, 8 * 2**20)])
def test_memory_is_the_machines_or_the_containers(tmp_path: Path, limit: str | None, expected: int) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9999 kB\nMemAvailable: 8192 kB\n")
    if limit:
        (tmp_path / "memory.max").write_text(limit)
        (tmp_path / "memory.current").write_text(str(2**20))
    assert available_bytes(tmp_path, tmp_path) == expected


def test_batches_are_cut_by_tokens_as_well_as_rows() -> None:
    lengths = np.full(40, 100, np.int32)
    rows = Rows(list(range(40)), list, lengths, pass_tokens=800)  # type: ignore[arg-type]
    shards = plan_shards(rows, batch_size=16)
    assert {len(batch) for shard in shards for batch in shard.batches} == {8}
    assert sorted(np.concatenate([shard.ids for shard in shards])) == list(range(40))
