"""Does this config give the same numbers on one process and on several? Its first steps are trained both ways.

A config with phases passes through all of them, on so few rows that an epoch is a few steps.

What is compared is what must not depend on the number of processes or the strategy: learning rates, losses, gradient
norms, the last evaluation's logits, the trained weights, and the frozen ones byte for byte.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from dist_finetune.errors import TrainingError, UserError
from dist_finetune.launchers.local import count_gpus
from dist_finetune.run_folder import number, output_of
from dist_finetune.spec import Spec
from dist_finetune.spec_file import load_spec

# Largest relative difference of losses and gradient norms, largest absolute one of logits and weights. GPUs add up in
# another order in every kernel and batch size.
TOLERANCES = {
    "cpu": {"train/loss": 1e-5, "train/grad_norm": 5e-5, "logits": 1e-4, "weights": 1e-4},
    "cuda": {"train/loss": 1e-4, "train/grad_norm": 1e-3, "logits": 1e-3, "weights": 1e-3},
}
NO_GRADIENT = "key.bias"
"""An attention's key bias has no true gradient: Adam turns its rounding noise into steps of full size."""
NEAR = 1e-3  # of losses, relative
NEAR_WORDS = (
    "Losses this near may part by rounding alone, where a ReLU's input is at its kink or the learning rate is high "
    "(docs/sameness.md): try another train.seed, or a tenth of train.lr"
)
TAIL_CHARACTERS = 1500
PLAINEST = ("shard.strategy=ddp", "shard.offload=none", "shard.frozen=auto", "shard.deepspeed={}")
WORD_PHASES = {"lp-ft": 2, "gradual": 4}
"""As many phases as a word for them is checked with: gradual with the head, a part of the blocks, more, and all."""


@dataclass(frozen=True)
class SelfCheck:
    """The comparison. `parted` says where the two runs part, None where they agree."""

    num_processes: int
    strategy: str
    num_steps: int
    differences: dict[str, float]
    """Largest difference by the keys of TOLERANCES."""
    num_frozen: int
    parted: str | None
    is_near: bool = False
    """They part in numbers alone, and by no more than rounding may grow to."""

    def lines(self) -> str:
        """The answer as text."""
        found = ", ".join(f"{key} {value:.1e}" for key, value in self.differences.items())
        way = f"{self.num_steps} steps on 1 process with ddp and on {self.num_processes} with {self.strategy}"
        answer = "yes, the same numbers" if self.parted is None else f"NO: {self.parted}"
        compared = f"largest differences: {found}; {self.num_frozen} frozen tensors compared byte for byte"
        return "\n".join([f"{way}: {answer}", compared, *([NEAR_WORDS] if self.is_near else [])])


def check_config(
    config: str, overrides: Sequence[str], gpus: int | None, processes: int | None, steps: int
) -> SelfCheck:
    """Trains the first `steps` optimizer steps of a config on one process and on several, in fp32 without dropout.

    Raises UserError for a config that can't be compared, TrainingError where a run fails, with its last words.
    """
    spec = load_spec(config, list(overrides))
    available = count_gpus()
    num_processes = gpus or processes or available or 2
    if num_processes < 2:
        raise UserError("selfcheck compares one process with several; give --processes 2 or more")
    _refuse(spec)
    output = output_of(spec)
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".selfcheck-", dir=output) as folder:
        fixed = [*overrides, *_comparable(spec, steps), *_shortened(spec, steps), f"output={json.dumps(folder)}"]
        alone = _train(config, [*fixed, *PLAINEST, "name=alone"], 1)
        several = _train(config, [*fixed, "name=several"], num_processes)
        return compare_runs(alone, several, num_processes, "cuda" if available else "cpu")


def _refuse(spec: Spec) -> None:
    if spec.task == "features" or spec.strategy == "auto":
        raise UserError("selfcheck compares training; it needs a config without task: features and strategy: auto")


def _comparable(spec: Spec, steps: int) -> list[str]:
    """What makes two runs comparable: no dropout, whose draws differ between ranks, and full precision."""
    freeze = spec.freeze.model_dump(mode="json", by_alias=True, exclude_unset=True) | {"dtype": None}
    return [
        f"train.max_steps={steps}", "train.precision=fp32", "model.dropout=0.0", "train.early_stop=null",
        f"freeze={json.dumps(freeze)}", "checkpoint.every=1000000 steps", "checkpoint.best=null", "track.wandb=off",
    ]  # fmt: skip


def _shortened(spec: Spec, steps: int) -> list[str]:
    """What lasts longer than its share of the steps made to last that long: phases an epoch of few rows each, a warm-up
    half of it."""
    num_phases = WORD_PHASES[spec.phases] if isinstance(spec.phases, str) else max(1, len(spec.phases))
    share = max(1, steps // num_phases)
    short = [f"train.warmup={share // 2}"] if spec.train.warmup >= share else []
    if not spec.phases:
        return short
    rows = share * spec.train.global_batch_size
    short.append(f"data.max_rows={min(rows, spec.data.max_rows or rows)}")
    if isinstance(spec.phases, str):
        return [*short, f"train.epochs={num_phases}"]
    phases = [phase.model_dump(mode="json", by_alias=True, exclude_unset=True) for phase in spec.phases]
    for phase in phases:
        phase |= {"epochs": 1, "until": None, "freeze": phase["freeze"] | {"dtype": None}}
        if (phase.get("warmup") or 0) >= share:
            phase["warmup"] = share // 2
    return [*short, f"phases={json.dumps(phases)}"]


def _train(config: str, overrides: Sequence[str], num_processes: int) -> Path:
    """Runs a training to its end, quietly; returns its folder."""
    flag = "--gpus" if count_gpus() else "--processes"
    command = [sys.executable, "-m", "dist_finetune", "run", config, *overrides, flag, str(num_processes)]
    environment = {**os.environ, "NVIDIA_TF32_OVERRIDE": "0"}  # torch lets fp32 convolutions round to TF32
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        words = (done.stderr or done.stdout)[-TAIL_CHARACTERS:]
        raise TrainingError(f"the run on {num_processes} processes failed with exit code {done.returncode}:\n{words}")
    values = dict(o.partition("=")[::2] for o in overrides)
    return Path(json.loads(values["output"])) / values["name"]


def compare_runs(alone: Path, several: Path, num_processes: int, device: str) -> SelfCheck:
    """Compares the folders of two finished runs of the same steps."""
    tolerances, steps = TOLERANCES[device], [_steps(alone), _steps(several)]
    far: str | None = None
    parted = None if [s["step"] for s in steps[0]] == [s["step"] for s in steps[1]] else "the runs took other steps"
    differences = dict.fromkeys(tolerances, 0.0)
    for mine, theirs in zip(*steps, strict=False):
        if mine["train/lr"] != theirs["train/lr"]:
            parted = parted or f"step {mine['step']}: train/lr is {theirs['train/lr']}, alone {mine['train/lr']}"
        for key in ("train/loss", "train/grad_norm"):
            difference = _no_nan(abs(mine[key] - theirs[key]) / max(abs(mine[key]), 1e-12))
            differences[key] = max(differences[key], difference)
            if not difference <= tolerances[key]:
                far = far or f"step {mine['step']}: {key} is {theirs[key]:.7g}, alone {mine[key]:.7g}"
    weights = [load_file(run / "model" / "model.safetensors") for run in (alone, several)]
    logits = [load_file(run / "predictions" / "validation.safetensors")["logits"] for run in (alone, several)]
    differences["logits"] = _largest(*logits)
    frozen = _frozen_names(alone)
    for name, tensor in weights[0].items():
        if name in frozen:
            if tensor.tobytes() != weights[1][name].tobytes():
                parted = parted or f"{name} is frozen and differs in the saved models"
        elif not name.endswith(NO_GRADIENT):
            differences["weights"] = max(differences["weights"], _largest(tensor, weights[1][name]))
    for key in ("weights", "logits"):
        if not differences[key] <= tolerances[key]:
            far = far or f"{key} after the last step differ by {differences[key]:.1e}"
    strategy = json.loads((several / "plan.json").read_text(encoding="utf-8"))["strategy"]
    is_near = parted is None and far is not None and differences["train/loss"] < NEAR
    return SelfCheck(num_processes, strategy, len(steps[0]), differences, len(frozen), parted or far, is_near)


def _steps(run: Path) -> list[dict[str, Any]]:
    """Rows of optimizer steps, without those that `train.max_skipped` left out."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if "train/grad_norm" in row]
    return [{key: number(value) for key, value in row.items()} for row in rows]


def _frozen_names(run: Path) -> set[str]:
    """What no phase trains."""
    phases = json.loads((run / "freeze.json").read_text(encoding="utf-8"))["phases"].values()
    return set.intersection(*({t["name"] for t in phase["tensors"] if t["frozen"]} for phase in phases))


def _largest(one: NDArray[Any], other: NDArray[Any]) -> float:
    if one.shape != other.shape:
        return float("inf")
    return _no_nan(float(np.abs(one.astype(np.float64) - other.astype(np.float64)).max(initial=0.0)))


def _no_nan(difference: float) -> float:
    """Infinity for NaN, which compares with nothing and which `max` passes over."""
    return math.inf if math.isnan(difference) else difference
