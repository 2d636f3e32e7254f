#!/usr/bin/env python3
"""Side by side with what a user would pick instead: transformers.Trainer for texts, a loop around timm for images.

    python benchmarks/peers.py --shared PATH [--jobs main|all|NAME ...] [--seeds 0 1 2] [--rows 2000] [--out FOLDER]

PATH holds `peers/trainer_text.py`, `peers/trainer_image.py`, `data/sst2` and `data/hymenoptera`. Every run has 2
processes of 1 thread; ours and theirs take turns, so that whatever else the machine does slows both. Our seconds count
what the cache takes to fill; nobody's count evaluations or checkpoints, of which peers have none. Prints a table and
where our time goes, writes every number to FOLDER/peers.json, and exits with 1 where ours is slower than a peer, more
than a point less accurate, short of a goal, or takes more memory.
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
from typing import Any

import torch
import yaml
from peer_results import ALONE, OURS, Result, show, summed

from dist_finetune import load_spec, make_plan
from dist_finetune.models.demo import efficientnet_file, minilm_folder

PROCESSES = 2
IMAGE_SIZE = 240
"""At 224 a head alone is right on 0.947 of ants and bees, 0.008 up or down by its seed; at 240 on 0.96."""
GROUPED = "Trainer, grouped by length"


@dataclass(frozen=True)
class Job:
    """One comparison: what is frozen, in our words and in the peer's number, and how long it trains."""

    kind: str
    freeze: Any
    peer_freeze: int
    epochs: int
    goals: dict[str, float]
    """Times faster than a peer that we mean to be."""
    lrs: tuple[float, ...] = ()
    """A sweep: the same job once for each, one after the other."""


def first_blocks(number: int) -> dict[str, Any]:
    return {"embeddings": True, "layers": f"0-{number - 1}"}


def text(freeze: Any, peer_freeze: int, epochs: int, grouped: float, default: float, *lrs: float) -> Job:
    return Job("text", freeze, peer_freeze, epochs, {GROUPED: grouped, "Trainer": default}, lrs or (5e-5,))


def image(freeze: Any, peer_freeze: int, epochs: int, goal: float) -> Job:
    return Job("image", freeze, peer_freeze, epochs, {"timm loop": goal}, (1e-3,))


JOBS = {
    "text-4of6-3": text(first_blocks(4), 4, 3, 1.7, 3.2),
    "image-head-5": image("backbone", 7, 5, 1.0),
    "text-none-3": text("none", -1, 3, 1.15, 2.0),
    "text-4of6-10": text(first_blocks(4), 4, 10, 2.0, 4.0),
    "text-5of6-10": text(first_blocks(5), 5, 10, 3.0, 5.0),
    "text-head-10": text(first_blocks(6), 6, 10, 15.0, 28.0),
    "image-head-10": image("backbone", 7, 10, 9.0),
    "image-5stages-10": image({"embeddings": True, "layers": "0-4"}, 5, 10, 2.0),
    "text-5of6-3-sweep": text(first_blocks(5), 5, 3, 3.5, 6.0, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4),
}
MAIN = ("text-4of6-3", "image-head-5")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True, help="folder with peers/ and data/")
    parser.add_argument("--out", type=Path, default=Path("runs/peers"), help="folder for runs and results")
    parser.add_argument("--jobs", nargs="+", default=["main"], choices=["main", "all", *JOBS], metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", type=int, default=2000, help="training rows of SST-2")
    parser.add_argument("--epochs", type=int, help="instead of each job's own number")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of ours and of the peers")
    parser.add_argument("--one-process", action="store_true", help="also ours alone, for samples a second")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds that one run may take")
    given = parser.parse_args()
    given.shared, given.out = given.shared.resolve(), given.out.resolve()
    if given.precision == "bf16" and not torch.cpu._is_amx_tile_supported():
        has = "AVX-512 for bf16" if torch.cpu._is_avx512_bf16_supported() else "no bf16 at all"
        print(f"skipped: bf16 is compared on CPUs with AMX; this one has {has}")
        return
    given.out.mkdir(parents=True, exist_ok=True)
    names = {"main": MAIN, "all": tuple(JOBS)}
    write_texts(given)
    results: list[Result] = []
    for name in dict.fromkeys(n for asked in given.jobs for n in names.get(asked, (asked,))):
        for seed in given.seeds:
            results += compare(name, JOBS[name], seed, given)
            (given.out / "peers.json").write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n")
    sys.exit(0 if show(results, {name: job.goals for name, job in JOBS.items()}) else 1)


def compare(name: str, job: Job, seed: int, given: argparse.Namespace) -> list[Result]:
    """One job with one seed, by each program in turn."""
    epochs = given.epochs or job.epochs
    results = []
    for processes in (PROCESSES, 1) if given.one_process else (PROCESSES,):
        cache = given.out / "cache" / f"{name}-{seed}-{processes}"
        shutil.rmtree(cache, ignore_errors=True)  # each job fills its own, once for all its learning rates
        ours = [run_ours(name, job, epochs, seed, lr, cache, processes, given) for lr in job.lrs]
        results.append(told(summed(ours)))
    for program in job.goals:
        theirs = [run_peer(name, job, program, epochs, seed, lr, given) for lr in job.lrs]
        results.append(told(summed(theirs)))
    return results


def run_ours(
    name: str, job: Job, epochs: int, seed: int, lr: float, cache: Path, processes: int, given: argparse.Namespace
) -> Result:
    """A run of the program under test, by its own command; its numbers are those that it leaves in its folder."""
    path = given.out / f"{name}-{seed}-{lr:g}-{processes}.yaml"
    path.write_text(yaml.safe_dump({**config_of(job, epochs, seed, lr, cache, given), "name": path.stem}))
    command = [sys.executable, "-m", "dist_finetune", "run", path, "--processes", processes, "--fresh"]
    wall_s, _ = timed(command, given)
    run = given.out / "runs" / path.stem
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    rows = [row for row in lines if "perf/step_s" in row]
    # Filling the cache with the training rows is part of our training. Validation rows go through the frozen part once
    # for all evaluations, which peers pay for after their clock has stopped.
    train_s, fill_s, tail_s = summary["train_s"] + summary["cache_s"], 0.0, None
    started = time.perf_counter()
    forecast = make_plan(load_spec(path, [])).costs.forecast
    plan_s = time.perf_counter() - started
    for seconds in fill_seconds(cache):
        if summary["cache_s"] > sum(seconds.values()):  # else it was there already: a later run of a sweep
            train_s -= seconds["validation"]
            fill_s = seconds["train"]
        assert forecast is not None
        share = forecast.frozen_prefix_share  # of the operations of a forward pass, as the plan counts them
        tail_s = epochs * seconds["train"] * 3 * (1 - share) / share
    return Result(
        name,
        OURS if processes == PROCESSES else ALONE,
        seed,
        summary["metrics"]["eval/accuracy"],
        train_s,
        wall_s,
        summary["peak_memory_gib"],
        rows[-1]["progress/samples"],
        len(rows),
        fill_s,
        tail_s,
        sum(row["perf/data_wait_s"] for row in rows),
        plan_s,
    )


def fill_seconds(cache: Path) -> list[dict[str, float]]:
    """What filling each entry of a cache folder took, by split. Tokens of large data sets lie there too."""
    metas = [meta for meta in cache.glob("*/meta.json") if not meta.parent.name.startswith("tokens-")]
    return [json.loads(meta.read_text(encoding="utf-8"))["seconds"] for meta in metas]


def config_of(job: Job, epochs: int, seed: int, lr: float, cache: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Our config for a job: the peers' settings, their batch sizes, and no checkpoint before the last."""
    common = {"epochs": epochs, "lr": lr, "warmup": 0, "seed": seed, "precision": given.precision}
    if job.kind == "text":  # as Trainer's defaults have it
        config: dict[str, Any] = {
            "model": {"name": "demo:minilm"},
            "data": {
                "train": str(given.out / "sst2-train.jsonl"),
                "validation": str(given.out / "sst2-test.jsonl"),
                "max_length": 128,
            },
            "train": {**common, "global_batch_size": 32 * PROCESSES, "weight_decay": 0.0},
        }
    else:
        data = given.shared / "data" / "hymenoptera"
        config = {
            "model": {"name": "demo:efficientnet-lite0"},
            "data": {"train": str(data / "train"), "validation": str(data / "val"), "image_size": IMAGE_SIZE},
            "train": {
                **common, "global_batch_size": 16 * PROCESSES, "schedule": "constant", "max_grad_norm": None
            },
        }  # fmt: skip
    return {
        **config,
        "freeze": job.freeze,
        "cache": {"folder": str(cache)},
        "checkpoint": {"every": f"{epochs} epochs"},
        "track": {"wandb": "off"},
        "output": str(given.out / "runs"),
    }


def run_peer(name: str, job: Job, program: str, epochs: int, seed: int, lr: float, given: argparse.Namespace) -> Result:
    """A run of a peer under torchrun; it prints its numbers as one line of JSON."""
    common: list[object] = ["--epochs", epochs, "--lr", lr]
    if job.kind == "text":
        data = given.shared / "data" / "sst2"
        script = [
            "trainer_text.py", "--model", minilm_folder(), "--train", data / "train.tsv", "--test", data / "test.tsv",
            "--rows", given.rows, "--freeze-layers", job.peer_freeze, "--seed", seed,
        ]  # fmt: skip
        script += ["--group-by-length"] if program == GROUPED else []
    else:
        data = given.shared / "data" / "hymenoptera"
        script = [
            "trainer_image.py",
            "--size",
            IMAGE_SIZE,
            "--weights",
            efficientnet_file(),
            "--data",
            data,
            "--freeze-until",
            job.peer_freeze,
        ]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}"]
    if given.precision == "bf16" and job.kind == "image":  # Trainer has a way of its own, see `timed`
        launcher.append(str(Path(__file__).with_name("in_bf16.py")))
    wall_s, out = timed([*launcher, given.shared / "peers" / script[0], *script[1:], *common], given)
    said = json.loads(next(line for line in out.splitlines() if line.startswith('{"peer"')))
    return Result(name, program, seed, said["accuracy"], said["train_s"], wall_s, said["peak_rss_mib"] / 1024)


def write_texts(given: argparse.Namespace) -> None:
    """The rows that the text peer takes of SST-2, in its order, as files for our config."""
    for source, target, limit in (("train.tsv", "sst2-train", given.rows), ("test.tsv", "sst2-test", 10**9)):
        with (given.shared / "data" / "sst2" / source).open(encoding="utf-8") as file:
            rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        random.Random(0).shuffle(rows)
        lines = (json.dumps({"sentence": row["sentence"], "label": int(row["label"])}) for row in rows[:limit])
        (given.out / f"{target}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def timed(command: Sequence[object], given: argparse.Namespace) -> tuple[float, str]:
    """Seconds and output of a command; it and all its processes end within the time limit. Exits where it fails."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    if (
        given.precision == "bf16" and "dist_finetune" not in command
    ):  # which refuses it; transformers.Trainer follows it
        env["ACCELERATE_MIXED_PRECISION"] = "bf16"
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
    # a peer now and then aborts at its exit, after it has said its numbers
    if process.returncode and '{"peer"' not in out:
        sys.exit(f"{' '.join(map(str, command))} ended with {process.returncode}:\n{err[-3000:]}")
    return time.perf_counter() - started, out


def told(result: Result) -> Result:
    print(
        f"{result.job}, seed {result.seed}, {result.program}: accuracy {result.accuracy:.4f}, "
        f"training {result.train_s:.1f} s, whole command {result.wall_s:.1f} s, peak {result.peak_gib:.2f} GiB",
        flush=True,
    )
    return result


if __name__ == "__main__":
    main()
