#!/usr/bin/env python3
"""Side by side with what a user would pick instead: transformers.Trainer for texts, a loop around timm for images.

    python benchmarks/peers.py --shared PATH [--only text|image] [--seeds 0 1 2] [--rows 2000] [--out FOLDER]

PATH holds `peers/trainer_text.py`, `peers/trainer_image.py`, `data/sst2` and `data/hymenoptera`. Every run has 2
processes of 1 thread; ours and theirs take turns, so that whatever else the machine does slows both. Prints a table,
writes every number to FOLDER/peers.json, and exits with 1 where ours is slower or more than a point less accurate.
"""

import argparse
import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import yaml

from dist_finetune.models.demo import efficientnet_file, minilm_folder

PROCESSES = 2
OURS = "dist_finetune"
POINT = 0.01


@dataclass(frozen=True)
class Result:
    """One run: seconds of the training loop as the program states them, and of the whole command."""

    job: str
    program: str
    seed: int
    accuracy: float
    train_s: float
    wall_s: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True, help="folder with peers/ and data/")
    parser.add_argument("--out", type=Path, default=Path("runs/peers"), help="folder for runs and results")
    parser.add_argument("--only", choices=["text", "image"], help="one of the two jobs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", type=int, default=2000, help="training rows of SST-2")
    parser.add_argument("--epochs", type=int, help="instead of each job's own number (text 3, image 5)")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds that one run may take")
    given = parser.parse_args()
    given.shared, given.out = given.shared.resolve(), given.out.resolve()
    given.out.mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    for job, compare in (("text", compare_text), ("image", compare_image)):
        if given.only in (None, job):
            results += compare(given)
    (given.out / "peers.json").write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")
    sys.exit(0 if show(results) else 1)


def compare_text(given: argparse.Namespace) -> list[Result]:
    """MiniLM on rows of SST-2, embeddings and 4 of 6 blocks frozen, 32 rows a process and step."""
    data, epochs = given.shared / "data" / "sst2", given.epochs or 3
    train, test = given.out / "sst2-train.jsonl", given.out / "sst2-test.jsonl"
    write_rows(data / "train.tsv", train, given.rows)
    write_rows(data / "test.tsv", test, 10**9)
    results = []
    for seed in given.seeds:
        config = {
            "model": {"name": "demo:minilm"},
            "data": {"train": str(train), "validation": str(test), "max_length": 128},
            "freeze": {"embeddings": True, "layers": "0-3"},
            "train": {
                "epochs": epochs, "global_batch_size": 32 * PROCESSES, "lr": 5e-5, "warmup": 0, "weight_decay": 0.0,
                "seed": seed,
            },
        }  # fmt: skip
        results.append(run_ours("text", config, seed, given))
        for program, flags in (("Trainer", []), ("Trainer, grouped by length", ["--group-by-length"])):
            arguments = [
                "--model", minilm_folder(), "--train", data / "train.tsv", "--test", data / "test.tsv",
                "--rows", given.rows, "--freeze-layers", 4, "--epochs", epochs, "--seed", seed, *flags,
            ]  # fmt: skip
            results.append(run_peer("text", program, "trainer_text.py", arguments, seed, given))
    return results


def compare_image(given: argparse.Namespace) -> list[Result]:
    """EfficientNet-Lite0 on ants and bees, only the classifier trains, 16 images a process and step."""
    data, epochs = given.shared / "data" / "hymenoptera", given.epochs or 5
    results = []
    for seed in given.seeds:
        config = {
            "model": {"name": "demo:efficientnet-lite0"},
            "data": {"train": str(data / "train"), "validation": str(data / "val"), "image_size": 224},
            "freeze": "backbone",
            "train": {
                "epochs": epochs, "global_batch_size": 16 * PROCESSES, "lr": 1e-3, "schedule": "constant", "warmup": 0,
                "max_grad_norm": None, "seed": seed,
            },
        }  # fmt: skip
        results.append(run_ours("image", config, seed, given))
        arguments = ["--weights", efficientnet_file(), "--data", data, "--freeze-until", 7, "--epochs", epochs]
        results.append(run_peer("image", "timm loop", "trainer_image.py", arguments, seed, given))
    return results


def write_rows(source: Path, target: Path, limit: int) -> None:
    """The rows that the peer takes of a .tsv file, in its order."""
    with source.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    random.Random(0).shuffle(rows)
    lines = (json.dumps({"sentence": row["sentence"], "label": int(row["label"])}) for row in rows[:limit])
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")


def run_ours(job: str, config: dict[str, Any], seed: int, given: argparse.Namespace) -> Result:
    """A run of the program under test, by its own command; its numbers are those of summary.json."""
    name = f"{job}-{seed}"
    path = given.out / f"{name}.yaml"
    cache = given.out / f"cache-{name}"
    shutil.rmtree(cache, ignore_errors=True)  # each run fills its own
    more = {"track": {"wandb": "off"}, "output": str(given.out / "runs"), "cache": {"folder": str(cache)}}
    path.write_text(yaml.safe_dump({**config, **more}))
    command = [sys.executable, "-m", "dist_finetune", "run", path, "--processes", PROCESSES, "--fresh"]
    wall_s, _ = timed(command, given)
    summary = json.loads((given.out / "runs" / name / "summary.json").read_text(encoding="utf-8"))
    train_s = summary["cache_s"] + summary["train_s"]  # filling the cache is part of our training
    return told(Result(job, OURS, seed, summary["metrics"]["eval/accuracy"], train_s, wall_s))


def run_peer(
    job: str, program: str, script: str, arguments: Sequence[object], seed: int, given: argparse.Namespace
) -> Result:
    """A run of a peer under torchrun; it prints its numbers as one line of JSON."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}"]
    wall_s, out = timed([*launcher, given.shared / "peers" / script, *arguments], given)
    said = json.loads(next(line for line in out.splitlines() if line.startswith('{"peer"')))
    return told(Result(job, program, seed, said["accuracy"], said["train_s"], wall_s))


def timed(command: Sequence[object], given: argparse.Namespace) -> tuple[float, str]:
    """Seconds and output of a command; it and all its processes end within the time limit. Exits where it fails."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    started = time.perf_counter()
    process = subprocess.Popen(
        [str(word) for word in command], cwd=given.out, env=env, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=given.timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        sys.exit(f"{' '.join(map(str, command))} took more than {given.timeout} s")
    if process.returncode:
        sys.exit(f"{' '.join(map(str, command))} ended with {process.returncode}:\n{err[-3000:]}")
    return time.perf_counter() - started, out


def told(result: Result) -> Result:
    print(
        f"{result.job}, seed {result.seed}, {result.program}: accuracy {result.accuracy:.4f}, "
        f"training {result.train_s:.1f} s, whole command {result.wall_s:.1f} s",
        flush=True,
    )
    return result


def show(results: Sequence[Result]) -> bool:
    """Prints means, medians and ratios; True where ours is at least as fast and as accurate as each peer."""
    print(f"\n{'job':6} {'program':28} {'accuracy':>9} {'train s':>8} {'ratio':>6} {'whole s':>8} {'ratio':>6}")
    holds = True
    for job in dict.fromkeys(result.job for result in results):
        mine = [result for result in results if (result.job, result.program) == (job, OURS)]
        for program in dict.fromkeys(result.program for result in results if result.job == job):
            theirs = [result for result in results if (result.job, result.program) == (job, program)]
            accuracy = mean(r.accuracy for r in theirs)
            train_s, wall_s = median(r.train_s for r in theirs), median(r.wall_s for r in theirs)
            train_ratio, wall_ratio = train_s / median(r.train_s for r in mine), wall_s / median(r.wall_s for r in mine)
            seconds = f"{train_s:8.1f} {train_ratio:6.2f} {wall_s:8.1f} {wall_ratio:6.2f}"
            print(f"{job:6} {program:28} {accuracy:9.4f} {seconds}")
            holds = holds and train_ratio >= 1 and mean(r.accuracy for r in mine) >= accuracy - POINT
    print("accuracy: mean over seeds; seconds: median; ratio: theirs to ours, above 1 where ours is faster")
    return holds


if __name__ == "__main__":
    main()
