"""Kills, signals and damaged files at random moments: `python benchmarks/faults.py --kills 100` prints a table.

A small BERT with dropout trains on 2 CPU processes and is never left alone for long. After each fault the run folder is
looked at: every folder that bears a checkpoint's name must be whole (but for what the suite itself has damaged), and
nothing that was complete before may be lost. When the run has ended, its weights, predictions and metrics must be those
of a run that nobody disturbed, bit for bit. Exit code 1 where anything is not.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "dist"))

import torch
from harness import Run, command, read_lines, write_config
from job_process import JobProcess, hears_of_signals, last_step, run_command, started, wait_for
from material import Material, write_material

from dist_finetune.checkpoint.layout import COMPLETE, STATE, checkpoint_folders, step_of
from dist_finetune.checkpoint.read import damage

STRATEGIES = ("ddp", "zero2", "zero3", "fsdp")
NUM_PROCESSES = 2
START_S = 6.0  # about what a start takes before its first step
ATTEMPT_LIMIT_S = 300
END_LIMIT_S = 30
IN_START_UP = 0.2
"""Share of faults that come before the first step of an attempt."""
MAX_STEPS_BEFORE = 12
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@dataclass
class Tally:
    """What was done, and what was wrong afterwards."""

    done: Counter[str] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    resumes: int = 0
    runs: int = 0

    def note(self, fault: str, problems: list[str]) -> None:
        """Counts a fault and its consequences."""
        self.done[fault] += 1
        self.wrong[fault] += bool(problems)
        self.problems += [f"{fault}: {problem}" for problem in problems]


def kill_a_rank(job: JobProcess, draw: random.Random) -> None:
    os.kill(draw.choice(job.pids()[1:] or job.pids()), signal.SIGKILL)


def kill_all_ranks(job: JobProcess, draw: random.Random) -> None:
    for pid in job.pids():
        if pid != job.process.pid:
            os.kill(pid, signal.SIGKILL)


def kill_the_launcher(job: JobProcess, draw: random.Random) -> None:
    job.process.kill()


def kill_everything(job: JobProcess, draw: random.Random) -> None:
    for pid in job.pids():
        os.kill(pid, signal.SIGKILL)


def send_a_signal(job: JobProcess, draw: random.Random) -> None:
    wait_for(lambda: hears_of_signals(job.process.pid), 10, job.output)  # until then a signal ends any program
    job.process.send_signal(draw.choice(SIGNALS))


FAULTS: dict[str, Callable[[JobProcess, random.Random], None]] = {
    "kill -9 of one rank": kill_a_rank,
    "kill -9 of all ranks": kill_all_ranks,
    "kill -9 of the launcher": kill_the_launcher,
    "kill -9 of everything": kill_everything,
    "signal to the launcher": send_a_signal,
}


def truncate(shard: Path, draw: random.Random) -> None:
    os.truncate(shard, draw.randrange(shard.stat().st_size))


def flip_a_bit(shard: Path, draw: random.Random) -> None:
    content = bytearray(shard.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    shard.write_bytes(content)


def remove(shard: Path, draw: random.Random) -> None:
    shard.unlink()


def append_zeros(shard: Path, draw: random.Random) -> None:
    with shard.open("ab") as file:
        file.write(bytes(draw.randrange(1, 5000)))


def add_a_shard(shard: Path, draw: random.Random) -> None:
    shard.with_name("rank-00007.safetensors").write_bytes(shard.read_bytes())


def lose_the_manifest(shard: Path, draw: random.Random) -> None:
    shard.with_name(COMPLETE).unlink()


def garble_the_state(shard: Path, draw: random.Random) -> None:
    state = shard.with_name(STATE)
    state.write_text(state.read_text(encoding="utf-8").replace('"step": ', '"step": 1'), encoding="utf-8")


DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "shard truncated": truncate,
    "bit of a shard flipped": flip_a_bit,
    "shard removed": remove,
    "zeros after a shard": append_zeros,
    "shard of another run added": add_a_shard,
    "manifest lost": lose_the_manifest,
    "state.json changed": garble_the_state,
}


def config_of(material: Material, strategy: str, num_epochs: int) -> dict[str, object]:
    """Dropout on, several parameter groups, a checkpoint every 3 steps, an evaluation every 10."""
    return material.text(
        model={"name": str(material.bert), "dropout": None},
        train={"epochs": num_epochs, "lr": 1e-3, "layer_decay": 0.9, "eval_batch_size": 8, "log_every": 1},
        checkpoint={"every": "3 steps", "keep": 3},
        shard={"strategy": strategy},
    )


def undisturbed(material: Material, folder: Path, strategy: str, num_epochs: int) -> Run:
    """The run that all others must equal."""
    config = write_config(
        folder / "straight.yaml",
        config_of(material, strategy, num_epochs),
        name="straight",
        output=str(folder / "runs"),
    )
    done = command("train", config, folder=folder, num_processes=NUM_PROCESSES, timeout_s=ATTEMPT_LIMIT_S)
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    return Run(folder / "runs" / "straight", ())


def disturb(
    material: Material, folder: Path, strategy: str, num_epochs: int, max_faults: int, draw: random.Random, tally: Tally
) -> Run:
    """One run with up to `max_faults` faults, then left alone to its end."""
    name = f"disturbed-{tally.runs}"
    config = write_config(
        folder / f"{name}.yaml", config_of(material, strategy, num_epochs), name=name, output=str(folder / "runs")
    )
    run, spoiled = Run(folder / "runs" / name, ()), set[str]()
    tally.runs += 1
    kept = 0
    for number in range(max_faults + 1):
        with started(run_command(config, NUM_PROCESSES), folder, material) as job:
            fault = _one_fault(job, run.folder, draw) if number < max_faults else None
            code = job.wait(ATTEMPT_LIMIT_S if fault is None else END_LIMIT_S)
            output, tally.resumes = job.output(), tally.resumes + (number > 0)
        (folder / "out.txt").unlink()
        if fault is None:
            if code != 0:
                tally.note("left alone", [f"exit code {code}: {output[-1500:]}"])
            break
        problems = _look_at(run.folder, spoiled, code, fault)
        good = [folder for folder in checkpoint_folders(run.folder) if damage(folder) is None]
        newest = (step_of(good[0]) or 0) if good else 0
        if newest < kept:
            problems.append(f"step {kept} was saved, and the newest good checkpoint is now of step {newest}")
        tally.note(fault, problems)
        kept = newest
        if len(good) > 1 and draw.random() < 0.4:
            what = draw.choice(list(DAMAGES))
            DAMAGES[what](draw.choice(sorted(good[0].glob("rank-*"))), draw)
            spoiled.add(good[0].name)
            tally.note(what, [] if damage(good[0]) or what == "manifest lost" else ["the damage was not seen"])
            kept = step_of(good[1]) or 0
    return run


def _one_fault(job: JobProcess, run: Path, draw: random.Random) -> str | None:
    """Waits for a random moment and does something; None where the run ended before."""
    name = draw.choice(list(FAULTS))
    deadline = time.monotonic() + ATTEMPT_LIMIT_S
    if draw.random() < IN_START_UP:
        moment = time.monotonic() + draw.uniform(0.3, START_S)
        while time.monotonic() < moment and job.process.poll() is None:
            time.sleep(0.01)
    else:
        wanted, first = draw.randint(0, MAX_STEPS_BEFORE), None
        while job.process.poll() is None and time.monotonic() < deadline:
            step = last_step(run)
            if "going on from" in job.output() or "evaluat" in job.output() or step >= 0:
                first = step if first is None else first
                if step >= first + wanted:
                    break
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.1))
    if job.process.poll() is not None:
        return None
    try:
        FAULTS[name](job, draw)
    except (ProcessLookupError, IndexError):
        return None  # it ended at this very moment
    return name


def _look_at(run: Path, spoiled: set[str], code: int, fault: str) -> list[str]:
    """What is wrong with a run's folder after a fault."""
    root = run / "checkpoints"
    problems = [
        f"{folder.name} bears a checkpoint's name and is not complete"
        for folder in (sorted(root.glob("step-*")) if root.is_dir() else [])
        if not (folder / COMPLETE).exists() and folder.name not in spoiled
    ]
    for folder in checkpoint_folders(run):
        problem = damage(folder)
        if problem and folder.name not in spoiled:
            problems.append(f"{folder.name}: {problem}")
    if fault == "signal to the launcher" and code not in (75, 0):
        problems.append(f"exit code {code} after a signal")
    if fault.startswith("kill") and code == 75:
        problems.append("exit code 75 after a kill")
    return problems


def compare(straight: Run, other: Run) -> list[str]:
    """Every difference between a run and the undisturbed one."""
    if not (other.folder / "summary.json").exists() or other.summary["status"] != "finished":
        return [f"{other.folder.name} did not finish"]
    a, b = straight.weights(), other.weights()
    problems = [f"{name} differs" for name in a if not torch.equal(a[name], b[name])]
    if not torch.equal(straight.predictions()["logits"], other.predictions()["logits"]):
        problems.append("predictions differ")
    if _metrics(straight) != _metrics(other):
        problems.append("metrics differ")
    if other.summary["num_frozen_tensors_verified"] != straight.summary["num_frozen_tensors_verified"]:
        problems.append("not all frozen tensors were verified")
    return problems


def _metrics(run: Run) -> list[dict[str, object]]:
    rows = read_lines(run.folder / "metrics.jsonl")
    clocks = ("perf/", "mem/")
    return [{k: v for k, v in row.items() if not k.startswith(clocks) and k != "time"} for row in rows]


def suite(num_kills: int, folder: Path, seed: int, num_epochs: int, strategies: tuple[str, ...]) -> Tally:
    """Disturbs runs until `num_kills` faults have been done."""
    material, draw, tally = write_material(folder), random.Random(seed), Tally()
    straight = {}
    while sum(tally.done[name] for name in FAULTS) < num_kills:
        strategy = strategies[tally.runs % len(strategies)]
        place = folder / strategy
        place.mkdir(exist_ok=True)
        if strategy not in straight:
            straight[strategy] = undisturbed(material, place, strategy, num_epochs)
        left = num_kills - sum(tally.done[name] for name in FAULTS)
        run = disturb(material, place, strategy, num_epochs, left, draw, tally)
        tally.note(f"run to its end under {strategy}", compare(straight[strategy], run))
        print(f"{sum(tally.done[name] for name in FAULTS)} of {num_kills}", file=sys.stderr, flush=True)
    return tally


def table(tally: Tally) -> str:
    """The counts, and each problem by its words."""
    lines = [f"{'fault':<34}{'done':>6}{'wrong':>7}"]
    lines += [f"{name:<34}{count:>6}{tally.wrong[name]:>7}" for name, count in sorted(tally.done.items())]
    lines.append(f"{tally.runs} runs, {tally.resumes} starts on an existing folder")
    return "\n".join([*lines, *tally.problems])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="faults to do")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=8, help="epochs of a run, of 10 steps each")
    parser.add_argument("--folder", type=Path, help="where runs are kept; left out: a temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        tally = suite(options.kills, folder, options.seed, options.epochs, STRATEGIES)
    print(table(tally))
    sys.exit(1 if tally.problems else 0)


if __name__ == "__main__":
    main()
