"""What a rank that hangs is said to be doing."""

import threading
import time
from pathlib import Path

import torch

from dist_finetune import watchdog
from dist_finetune.cache.fill import require_seen
from dist_finetune.watchdog import WAITING_IN, place_of
from dist_finetune.world import _attempt


def test_a_rank_is_shown_in_whatever_folder_of_the_package_it_is(tmp_path: Path) -> None:
    """It waits in cache/fill.py, called from world.py, for a file that another one makes."""
    waiting = threading.Thread(target=_attempt, args=(lambda: require_seen(tmp_path / "made"),), daemon=True)
    waiting.start()
    time.sleep(0.5)
    try:
        place, waits = place_of(waiting.ident or 0)
    finally:
        (tmp_path / "made").touch()
        waiting.join()
    assert place.startswith("fill.py line "), place
    assert not waits


def test_a_rank_that_reads_from_its_gpu_waits_for_others() -> None:
    """Its collectives are queued there, as under the metrics of some steps: it is not the one that hangs."""
    over, number = threading.Lock(), torch.ones(1)
    over.acquire()
    # a read that takes as long as one of a GPU whose collective never ends
    reading = threading.Thread(target=lambda: over.acquire() and number.item(), daemon=True)
    reading.start()
    time.sleep(0.2)
    try:
        _, waits = place_of(reading.ident or 0)
    finally:
        over.release()
        reading.join()
    assert waits


def test_places_where_ranks_wait_are_files_that_are_there() -> None:
    """Among them where batches are normalised over all ranks, and where it is asked whether gradients are finite."""
    installed = Path(torch.__file__).parents[1]
    package = Path(watchdog.__file__).parents[1]
    assert [part for part in WAITING_IN if not (installed / part).exists() and not (package / part).exists()] == []
    waiting = (installed / "torch/nn/modules/_functions.py").read_text()
    assert "class SyncBatchNorm" in waiting
    assert "isfinite" in (package / "dist_finetune/engine/precision.py").read_text()
