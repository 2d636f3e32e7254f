"""The run folder: its files, who may write into it, and what an existing one means."""

import json
import math
import os
import platform
import shlex
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from dist_finetune.errors import UserError
from dist_finetune.hold import Hold, cannot_write
from dist_finetune.home import expand_home
from dist_finetune.spec import Spec
from dist_finetune.spec_file import resolved_yaml

Changes = Literal["none", "layout", "allow"]
RunState = Literal["new", "unfinished", "finished"]
LAYOUT_KEYS = (
    "shard.", "launch.", "track.", "checkpoint.", "output", "name", "data.num_workers", "cache.mode", "cache.folder",
    "cache.quota", "train.micro_batch_size", "train.eval_batch_size", "train.gradient_checkpointing", "train.compile",
    "train.skip_unread", "train.log_every",
)  # fmt: skip
ALLOWED_KEYS = (
    "train.epochs", "train.max_steps", "train.lr", "train.head_lr", "train.pattern_lr", "train.schedule",
    "train.warmup", "train.weight_decay", "train.max_grad_norm", "train.early_stop", "train.max_skipped",
    "train.precision",
)  # fmt: skip
STOP_FILE = "STOP"  # a user makes it to end a run with a checkpoint
METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"  # what `evaluate` found, a line each
ATTEMPTS = "attempts.jsonl"  # a line for each start: from which step, when, where
JOB_SCRIPT = "job.sbatch"
LOGS = "logs"  # the launcher's copies of what each rank printed
# Made anew where a run starts from its first step. Its attempts and its W&B run go on: it is the same run.
STARTED_OVER = (METRICS, EVALUATIONS, "freeze.json")
PACKAGES = (
    "torch",
    "torchvision",
    "accelerate",
    "deepspeed",
    "transformers",
    "timm",
    "datasets",
    "wandb",
    "dist-finetune",
)


def output_of(spec: Spec) -> Path:
    """The folder of all runs. `~` is the home of whoever runs this here: YAML, unlike a shell, leaves it as it is."""
    return expand_home(spec.output)


def folder_of(spec: Spec) -> Path:
    """<output>/<name>."""
    return output_of(spec) / spec.name


def resume_command(folder: Path) -> str:
    """What a user may paste into a shell to go on with a run, whatever its name holds."""
    return f"dist-finetune resume {shlex.quote(str(folder))}"


def check_run_folder(spec: Spec, fresh: bool, changes: Changes) -> RunState:
    """What the run's folder holds already. Writes nothing.

    Raises UserError where it holds a run of another config (beyond what `changes` lets differ), with the difference and
    the ways out, or something else: only a run is kept aside by `fresh`.
    """
    folder = folder_of(spec)
    config = folder / "config.yaml"
    try:
        if not folder.exists():
            return "new"
        # hidden files are left by a start that was killed, and by desktops
        held = [p.name for p in folder.iterdir() if not p.name.startswith(".")]
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror or error}; choose another output=... or name=...") from None
    if config.name not in held and set(held) - {LOGS, JOB_SCRIPT}:
        raise UserError(f"{folder} exists and is no run of this tool; choose another name=... or output=...")
    if fresh or config.name not in held:
        return "new"
    longer = refuse_other_config(config, spec, changes)
    return "finished" if read_summary(folder).get("status") == "finished" and not longer else "unfinished"


def enter_run_folder(spec: Spec, fresh: bool, changes: Changes, hold: Hold) -> RunState:
    """As `check_run_folder`, of a folder that no other job writes from here on, where it is there and not finished."""
    found = check_run_folder(spec, fresh, changes)
    if found == "finished" or not folder_of(spec).exists():
        return found
    hold.take()
    return check_run_folder(spec, fresh, changes)  # the job that held it may have brought it further


def start_run_folder(spec: Spec, fresh: bool, step: int, evaluated: bool, hold: Hold) -> Path:
    """Makes the run's folder, or readies it for going on after optimizer step `step` (0: from the start).

    What was recorded after that step is dropped, so that files and trackers tell one story. `fresh` keeps an existing
    folder aside, under a name with the time. Raises UserError where the place can't be written, or is another job's.
    """
    folder = folder_of(spec)
    try:
        if fresh and (folder / "config.yaml").exists():
            hold.take()
            hold.moved(_move_aside(folder))
        folder.mkdir(parents=True, exist_ok=True)
        if hold.take() and (folder / "config.yaml").exists():  # it was not there when this job looked
            raise UserError(f"{folder}: another job has begun this run since; start again to go on with what it left")
        write_text(folder / "config.yaml", resolved_yaml(spec))
        for leftover in (STOP_FILE, "summary.json", *(STARTED_OVER if step == 0 else ())):
            (folder / leftover).unlink(missing_ok=True)
        _trim_metrics(folder / METRICS, step, evaluated)
    except OSError as error:
        raise UserError(cannot_write(folder, error)) from None
    return folder


def _trim_metrics(path: Path, step: int, evaluated: bool) -> None:
    """Drops the rows of later steps, and of an evaluation at `step` that is to be done again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json_row(line)
        if row is None:
            continue
        is_due_again = row["step"] == step and not evaluated and any(key.startswith("eval/") for key in row)
        if row["step"] <= step and not is_due_again:
            kept.append(line + "\n")
    write_text(path, "".join(kept))


def num_attempts(folder: Path) -> int:
    """How often the run of a folder has started, by its attempts.jsonl."""
    path = folder / ATTEMPTS
    return len(path.read_text(encoding="utf-8").splitlines()) if path.exists() else 0


def read_summary(folder: Path) -> dict[str, Any]:
    """summary.json of a run, or {} where it has none yet. Raises UserError where it is damaged."""
    path = folder / "summary.json"
    if not path.exists():
        return {}
    try:
        summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: can't be read: {error}; without the file the run counts as unfinished") from None
    return summary


def json_text(value: Any, indent: int | None = None) -> str:
    """`value` as JSON, with null for NaN and infinities: Python would write these as words that are no JSON."""
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError:
        return json.dumps(_with_null(value), indent=indent)


def _with_null(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _with_null(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_null(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def number(value: float | None) -> float:
    """A metric as read from JSON, where `json_text` wrote null for NaN and infinities."""
    return math.nan if value is None else value


def json_row(line: str) -> dict[str, Any] | None:
    """The object of a line of JSON; None for one that was cut off, as by a full disk or a killed process."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes readable JSON; the file is whole or not there."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes through a temporary file and a rename, so that no reader and no crash meets half a file."""
    # processes of several containers have the same numbers
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):  # what failed is told, not this
            temporary.unlink()
        raise


def environment() -> dict[str, Any]:
    """Versions, machine and launcher variables that a later reader needs to explain a run. No secrets."""
    prefixes = (
        "SLURM_JOB",
        "SLURM_NNODES",
        "SLURM_NTASKS",
        "CUDA_VISIBLE_DEVICES",
        "OMP_NUM_THREADS",
        "HF_HUB_OFFLINE",
    )
    return {
        **installed_versions(),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "num_cpus": os.cpu_count(),
        "variables": {k: v for k, v in sorted(os.environ.items()) if k.startswith(prefixes)},
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def installed_versions() -> dict[str, Any]:
    """Versions of Python and, under "packages", of this package and those that decide on its numbers."""
    return {"python": sys.version.split()[0], "packages": {name: _version(name) for name in PACKAGES}}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _move_aside(folder: Path) -> Path:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    target = folder.with_name(f"{folder.name}.{stamp}")
    number = 1
    while target.exists():
        number += 1
        target = folder.with_name(f"{folder.name}.{stamp}-{number}")
    folder.rename(target)
    return target


def refuse_other_config(config: Path, spec: Spec, changes: Changes) -> bool:
    """Compares a run's config.yaml with `spec`; returns True where the run was made longer or otherwise changed.

    Raises UserError for differences that `changes` does not cover: "none" covers none, "layout" what changes no number
    (strategy, processes, logging), "allow" also what the user may change knowingly (epochs, learning rates).
    """
    old, new = flat(_read_config(config)), flat(spec.model_dump(mode="json", by_alias=True))
    changed = {key for key in old.keys() | new.keys() if old.get(key) != new.get(key)}
    covered = {"none": (), "layout": LAYOUT_KEYS, "allow": LAYOUT_KEYS + ALLOWED_KEYS}[changes]
    refused = sorted(key for key in changed if not key.startswith(covered))
    if refused:
        lines = [f"  {key}: {old.get(key)!r} before, {new.get(key)!r} now" for key in refused[:20]]
        ways = {
            "none": "Use name=... for a new run, --fresh to keep the old folder aside and start over, or "
            "`dist-finetune resume` to go on with changes",
            "layout": f"`{resume_command(config.parent)} --allow ...` takes other epochs and learning rates, where "
            "that is meant; the rest needs a new run: name=...",
            "allow": "These can't change within a run; use name=... for a new one",
        }[changes]
        raise UserError(f"{config.parent} holds a run of another config:\n" + "\n".join(lines) + f"\n{ways}")
    return bool(changed and any(key.startswith(ALLOWED_KEYS) for key in changed))


def _read_config(config: Path) -> dict[str, Any]:
    from dist_finetune.spec_file import load_spec

    return load_spec(config).model_dump(mode="json", by_alias=True)


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """The values of nested dicts by dotted key."""
    if not isinstance(node, dict):
        return {prefix: node}
    return {k: v for key, value in node.items() for k, v in flat(value, f"{prefix}.{key}".lstrip(".")).items()}
