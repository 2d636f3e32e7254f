"""Features at all depths, written to disk, against a bare inference loop over the same batches, taking turns.

python benchmarks/extraction.py CONFIG [key=value ...]

Exits with 1 where they come at less than 0.9 of the bare loop's rows a second.
"""

import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from torch.utils.data import DataLoader

from dist_finetune.data.tables import read_tables
from dist_finetune.evaluate import to_device
from dist_finetune.features.extract import plan_shards
from dist_finetune.features.job import FeatureJob, extract_all, prepare_features
from dist_finetune.features.store import Store
from dist_finetune.models.sources import forward_logits
from dist_finetune.report import Reporter
from dist_finetune.spec_file import load_spec
from dist_finetune.world import join_world

TURNS = 3
GOAL = 0.9


def bare_loop(job: FeatureJob) -> float:
    """Seconds of the model's forward pass over all rows, logits thrown away."""
    started_s = time.perf_counter()
    for rows in job.splits.values():
        batches = [ids.tolist() for shard in plan_shards(rows, job.store.key.batch_size) for ids in shard.batches]
        loader = DataLoader(rows.dataset, batch_sampler=batches, collate_fn=rows.collate, num_workers=rows.num_workers)
        with torch.inference_mode():
            for batch in loader:
                forward_logits(job.model, to_device(batch["inputs"], job.world.device))
    return time.perf_counter() - started_s


def main() -> None:
    spec = load_spec(sys.argv[1], sys.argv[2:])
    folder = Path(tempfile.mkdtemp())
    with join_world(spec.launch) as world:
        tables = read_tables(spec.data, spec.train.seed)
        job = prepare_features(spec, tables, folder, world, Reporter(False))
        num_rows = sum(rows.num_rows for rows in job.splits.values())
        bare_loop(job)  # reads and keeps the pixels, touches the weights
        ratios = []
        for turn in range(TURNS):
            bare_s = bare_loop(job)
            ours_s = extract_all(replace(job, store=Store(folder / str(turn), job.store.key))).seconds
            ratios.append(bare_s / ours_s)
            rates = (num_rows / bare_s, num_rows / ours_s)
            print(f"{rates[0]:.1f} rows/s bare, {rates[1]:.1f} with features at {len(job.depths)} depths")
        print(f"ratio {median(ratios):.3f} (median of {TURNS}; {min(ratios):.3f} to {max(ratios):.3f})")
    shutil.rmtree(folder)
    sys.exit(0 if median(ratios) >= GOAL else 1)


if __name__ == "__main__":
    main()
