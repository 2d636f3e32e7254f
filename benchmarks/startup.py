#!/usr/bin/env python3
"""What our own launcher costs: a run of one optimizer step by `dist-finetune run`, and by plain torchrun, in turns.

    python benchmarks/startup.py [--repeats 5] [--processes 2]

Prints medians of the seconds from the command to the first training step, and exits with 1 where `run` takes over a
second more than `torchrun` with the same worker and config.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import yaml

ALLOWED_S = 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={given.processes}"]
    ours = [sys.executable, "-m", "dist_finetune"]
    seconds: dict[str, list[float]] = {"dist-finetune run": [], "torchrun": []}
    with tempfile.TemporaryDirectory() as folder:
        config = write_config(Path(folder), given.processes)
        for _ in range(given.repeats):
            for name, command in (
                ("dist-finetune run", [*ours, "run", str(config), "--processes", str(given.processes), "--fresh"]),
                ("torchrun", [*torchrun, "-m", "dist_finetune", "train", str(config), "--fresh"]),
            ):
                seconds[name].append(first_step_s(command, Path(folder)))
    for name, found in seconds.items():
        print(f"{name:18} {median(found):5.2f} s to the first step ({min(found):.2f} to {max(found):.2f})")
    more = median(seconds["dist-finetune run"]) - median(seconds["torchrun"])
    print(f"difference {more:+.2f} s; allowed {ALLOWED_S:.1f}")
    sys.exit(0 if more <= ALLOWED_S else 1)


def write_config(folder: Path, processes: int) -> Path:
    config = {
        "model": {"name": "demo:minilm"},
        "data": {"train": "builtin:topics", "validation": 0.05, "max_rows": 200},
        "freeze": {"embeddings": True, "layers": "0-3"},
        "train": {"epochs": 1, "max_steps": 1, "global_batch_size": 4 * processes},
        "cache": "off",
        "track": {"wandb": "off"},
        "output": str(folder / "runs"),
        "name": "startup",
    }
    path = folder / "startup.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def first_step_s(command: list[str], folder: Path) -> float:
    """Seconds from the start of `command` to the end of its first optimizer step."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    started = time.time()
    subprocess.run(command, cwd=folder, env=env, check=True, timeout=300, capture_output=True)
    rows = (folder / "runs" / "startup" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    first = next(row for row in map(json.loads, rows) if "train/loss" in row)
    return float(first["time"]) - started


if __name__ == "__main__":
    main()
