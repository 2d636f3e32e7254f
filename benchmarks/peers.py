#!/usr/bin/env python3
"""Side by side with what a user would pick instead: transformers.Trainer for texts, a loop around timm for images.

    python benchmarks/peers.py --shared PATH [--jobs main|all|NAME ...] [--seeds 0 1 2] [--rows 2000] [--out FOLDER]

PATH holds `peers/trainer_text.py`, `peers/trainer_image.py`, `data/sst2` and `data/hymenoptera`. Every run has 2
processes of 1 thread; ours and theirs take turns, so that whatever else the machine does slows both. Our seconds count
what the cache takes to fill; nobody's count evaluations or checkpoints, of which peers have none. Prints a table and
where our time goes, writes every number to FOLDER/peers.json, and exits with 1 where ours falls short of a goal, is
more than a point less accurate, takes more memory, or more than 1.2 times what its arithmetic alone would take.

With GPUs the jobs are BERT-large, ResNet-50 and ConvNeXt-base in bf16 on all of them, against gpu_peer.py, with the
share of the device's arithmetic that is used. Weights come from `--gpu-models FOLDER` (bert-large/ as transformers
saves it, resnet50.safetensors, convnext_base.safetensors as timm has them); those that are not there are random, which
take as long, and whose accuracies say nothing.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
import yaml
from peer_jobs import CPU_JOBS, GPU_JOBS, JOBS, MAIN, Job, config_of, peer_command, write_texts
from peer_results import ALONE, OURS, Result, show, summed

from dist_finetune import load_spec, make_plan

PROCESSES = 2
"""Without GPUs."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True, help="folder with peers/ and data/")
    parser.add_argument("--out", type=Path, default=Path("runs/peers"), help="folder for runs and results")
    parser.add_argument("--jobs", nargs="+", default=["main"], choices=["main", "all", *JOBS], metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", type=int, default=2000, help="training rows of SST-2")
    parser.add_argument("--epochs", type=int, help="instead of each job's own number")
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="of all; left out: bf16 on GPUs, else fp32")
    parser.add_argument("--gpu-models", type=Path, help="folder of weights for the jobs on GPUs")
    parser.add_argument("--one-process", action="store_true", help="also ours alone, for samples a second")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds that one run may take")
    given = parser.parse_args()
    given.shared, given.out = given.shared.resolve(), given.out.resolve()
    has_gpus = torch.cuda.is_available()
    given.processes = torch.cuda.device_count() if has_gpus else PROCESSES
    given.precision = given.precision or ("bf16" if has_gpus else "fp32")
    if given.precision == "bf16" and not has_gpus and not torch.cpu._is_amx_tile_supported():
        has = "AVX-512 for bf16" if torch.cpu._is_avx512_bf16_supported() else "no bf16 at all"
        print(f"skipped: bf16 is compared on CPUs with AMX; this one has {has}")
        return
    given.out.mkdir(parents=True, exist_ok=True)
    names = {"main": MAIN[has_gpus], "all": tuple(GPU_JOBS if has_gpus else CPU_JOBS)}
    write_texts(given)
    results: list[Result] = []
    for name in dict.fromkeys(n for asked in given.jobs for n in names.get(asked, (asked,))):
        for seed in given.seeds:
            results += compare(name, JOBS[name], seed, given)
            (given.out / "peers.json").write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n")
    peak_flops = given.processes * matmul_flops() if has_gpus else None
    sys.exit(0 if show(results, {name: job.goals for name, job in JOBS.items()}, peak_flops) else 1)


def compare(name: str, job: Job, seed: int, given: argparse.Namespace) -> list[Result]:
    """One job with one seed, by each program in turn."""
    epochs = given.epochs or job.epochs
    results = []
    for processes in (given.processes, 1) if given.one_process else (given.processes,):
        cache = given.out / "cache" / f"{name}-{seed}-{processes}"
        shutil.rmtree(cache, ignore_errors=True)  # each job fills its own, once for all its learning rates
        ours = [run_ours(name, job, epochs, seed, lr, cache, processes, given) for lr in job.lrs]
        results.append(told(summed(ours)))
    for program in job.goals:
        theirs = [run_peer(name, job, program, epochs, seed, lr, given) for lr in job.lrs]
        # they compute what the freeze leaves to compute, for as many rows
        results.append(told(replace(summed(theirs), flops=results[0].frozen_flops)))
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
    train_s, fill_s, proof_s, tail_s = summary["train_s"] + summary["cache_s"], 0.0, summary["cache_s"], None
    started = time.perf_counter()
    forecast = make_plan(load_spec(path, [])).costs.forecast
    plan_s = time.perf_counter() - started
    whole = make_plan(load_spec(path, ["train.skip_unread=false"])).costs.forecast
    assert forecast is not None
    assert whole is not None
    num_samples = rows[-1]["progress/samples"]
    flops = num_samples * forecast.frozen_flops
    for seconds in fill_seconds(cache):
        prefix = forecast.frozen_prefix_share * forecast.forward_flops  # what filling took, as the plan counts it
        tail = 3 * (1 - whole.frozen_prefix_share) * whole.forward_flops
        tail_s = epochs * seconds["train"] * tail / prefix
        flops = num_samples * forecast.cached_flops
        if summary["cache_s"] > sum(seconds.values()):  # else it was there already: a later run of a sweep
            train_s -= seconds["validation"]
            fill_s = seconds["train"]
            proof_s -= sum(seconds.values())
            flops += num_samples / epochs * prefix
    return Result(
        name,
        OURS if processes == given.processes else ALONE,
        seed,
        summary["metrics"]["eval/accuracy"],
        train_s,
        wall_s,
        summary["peak_memory_gib"],
        num_samples,
        len(rows),
        fill_s,
        tail_s,
        proof_s,
        sum(row["perf/data_wait_s"] for row in rows),
        plan_s,
        flops,
        num_samples * whole.frozen_flops,
    )


def fill_seconds(cache: Path) -> list[dict[str, float]]:
    """What filling each entry of a cache folder took, by split. Tokens of large data sets lie there too."""
    metas = [meta for meta in cache.glob("*/meta.json") if not meta.parent.name.startswith("tokens-")]
    return [json.loads(meta.read_text(encoding="utf-8"))["seconds"] for meta in metas]


def run_peer(name: str, job: Job, program: str, epochs: int, seed: int, lr: float, given: argparse.Namespace) -> Result:
    wall_s, out = timed(peer_command(job, program, epochs, seed, lr, given), given)
    said = json.loads(next(line for line in out.splitlines() if line.startswith('{"peer"')))
    return Result(name, program, seed, said["accuracy"], said["train_s"], wall_s, said["peak_rss_mib"] / 1024)


def matmul_flops(size: int = 8192, rounds: int = 20) -> float:
    """Operations a second of one GPU in bf16, as a product of large matrices gets them."""
    matrix = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    for number in range(2 * rounds):
        if number == rounds:  # the first half has warmed it up
            torch.cuda.synchronize()
            started = time.perf_counter()
        matrix @ matrix
    torch.cuda.synchronize()
    return rounds * 2 * size**3 / (time.perf_counter() - started)


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
