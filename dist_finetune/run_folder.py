"""The run folder: its files, who may write into it, and what an existing one means."""

import difflib
import json
import os
import platform
import socket
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from dist_finetune.errors import UserError
from dist_finetune.spec import Spec
from dist_finetune.spec_file import resolved_yaml

LOGS = "logs"  # the launcher's copies of what each rank printed
STARTED_OVER = ("metrics.jsonl", "summary.json", "wandb.json")  # an unfinished run starts over with these made anew
PACKAGES = ("torch", "torchvision", "accelerate", "deepspeed", "transformers", "timm", "datasets", "wandb", "dist-finetune")


def folder_of(spec: Spec) -> Path:
    """<output>/<name>."""
    return Path(spec.output) / spec.name


def check_run_folder(spec: Spec, fresh: bool) -> Literal["new", "unfinished", "finished"]:
    """What the run's folder holds already. Writes nothing.

    Raises UserError where it holds a run of another config, with the difference and the ways out.
    """
    folder = folder_of(spec)
    config = folder / "config.yaml"
    if fresh or not folder.exists():
        return "new"
    if not config.exists():
        if any(p.name != LOGS for p in folder.iterdir()):
            raise UserError(f"{folder} exists and is no run of this tool; choose another name=... or output=...")
        return "new"
    _refuse_other_config(config, spec)
    return "finished" if read_summary(folder).get("status") == "finished" else "unfinished"


def create_run_folder(spec: Spec, fresh: bool) -> Path:
    """Makes the run's folder with config.yaml. `fresh` keeps an existing folder aside, under a name with the time.

    Raises UserError where the place can't be written.
    """
    folder = folder_of(spec)
    try:
        if fresh and (folder / "config.yaml").exists():
            _move_aside(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "config.yaml", resolved_yaml(spec))
        for leftover in STARTED_OVER:
            (folder / leftover).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: can't be written: {error.strerror or error}; choose another output=...") from None
    return folder


def read_summary(folder: Path) -> dict[str, Any]:
    """summary.json of a run, or {} where it has none yet."""
    path = folder / "summary.json"
    if not path.exists():
        return {}
    summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return summary


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes readable JSON; the file is whole or not there."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes through a temporary file and a rename, so that no reader and no crash meets half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def environment() -> dict[str, Any]:
    """Versions, machine and launcher variables that a later reader needs to explain a run. No secrets."""
    prefixes = ("SLURM_JOB", "SLURM_NNODES", "SLURM_NTASKS", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "HF_HUB_OFFLINE")
    return {
        "python": sys.version.split()[0],
        "packages": {name: _version(name) for name in PACKAGES},
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "num_cpus": os.cpu_count(),
        "variables": {k: v for k, v in sorted(os.environ.items()) if k.startswith(prefixes)},
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _move_aside(folder: Path) -> None:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    target = folder.with_name(f"{folder.name}.{stamp}")
    number = 1
    while target.exists():
        number += 1
        target = folder.with_name(f"{folder.name}.{stamp}-{number}")
    folder.rename(target)


def _refuse_other_config(config: Path, spec: Spec) -> None:
    old, new = config.read_text(encoding="utf-8").splitlines(), resolved_yaml(spec).splitlines()
    if old == new:
        return
    changes = [line for line in difflib.unified_diff(old, new, lineterm="", n=0) if line[:1] in "+-" and line[1:2] not in "+-"]
    raise UserError(
        f"{config.parent} holds a run of another config:\n"
        + "\n".join(f"  {line}" for line in changes[:20])
        + "\nUse name=... for a new run, or --fresh to keep the old folder aside and start over"
    )
