"""What `doctor` can see on one machine: versions, GPUs, disks, the hub and the W&B login. Nothing is downloaded."""

import importlib.metadata
import os
import shutil
import socket
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlparse

import torch
from packaging.requirements import Requirement
from packaging.version import Version

from dist_finetune.cache.entries import cache_root
from dist_finetune.launchers.environment import granted_gpus
from dist_finetune.launchers.local import count_gpus
from dist_finetune.plan import Plan
from dist_finetune.preflight import GPUS_MISSING_TODO, gpus_missing, visible_gpus
from dist_finetune.run_folder import output_of
from dist_finetune.spec import Spec
from dist_finetune.tracking import has_login

HUB_TIMEOUT_S = 3.0
SHM_BYTES = 2**30


@dataclass(frozen=True)
class Finding:
    """One answer: its state, what it is about, what was found, and what to do about it."""

    state: Literal["ok", "warn", "fail"]
    about: str
    text: str
    todo: str = ""


def local_findings(spec: Spec | None, plan: Plan | None, local_world_size: int | None) -> list[Finding]:
    """Everything that one machine shows by itself; `local_world_size` is None where no launcher says it."""
    return [
        *version_findings(),
        *gpu_findings(local_world_size),
        disk_finding(spec, plan),
        hub_finding(),
        wandb_finding(spec),
    ]


def version_findings() -> list[Finding]:
    """Installed versions against what this package needs, and pairs of packages that don't work together."""
    needed = [Requirement(text) for text in importlib.metadata.requires("dist-finetune") or ()]
    needed = [r for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
    findings = []
    for requirement in needed:
        version = _version(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            there = f"{requirement.name} {version}" if version else f"{requirement.name} is not installed"
            findings.append(
                Finding("fail", "versions", f"{there}, needs {requirement}", f'pip install "{requirement}"')
            )
    installed = [r.name for r in needed if _version(r.name)]
    findings += [*_pairs(), *wishes_unmet([name for name in installed if name != "torchvision"])]
    shown = ", ".join(f"{p} {_version(p)}" for p in ("torch", "accelerate", "deepspeed", "transformers", "timm"))
    return findings or [Finding("ok", "versions", shown)]


def _pairs() -> list[Finding]:
    """Packages built for one version of another: torchvision names its torch, and so does a driver its CUDA."""
    findings = []
    torch_version = Version(torch.__version__)
    for text in importlib.metadata.requires("torchvision") or ():
        requirement = Requirement(text)
        if requirement.name == "torch" and not requirement.specifier.contains(
            torch_version.base_version, prereleases=True
        ):
            findings.append(
                Finding(
                    "fail",
                    "versions",
                    f"torchvision {_version('torchvision')} is built for {requirement}, but torch is {torch_version}",
                    f'pip install "{requirement}" torchvision, both in one command',
                )
            )
    if not hasattr(_torchrun_parser().parse_args(["script"]), "signals_to_handle"):
        findings.append(
            Finding(
                "warn",
                "versions",
                f"torchrun of torch {torch_version} dies of SIGUSR1, by which SLURM warns of the time limit",
                "use a torch whose `torchrun --help` knows --signals-to-handle, or start one srun task for each GPU",
            )
        )
    return findings


def wishes_unmet(packages: Sequence[str]) -> list[Finding]:
    """What the installed `packages` say that they need of others, and what is there instead."""
    findings = []
    for package in packages:
        for text in importlib.metadata.requires(package) or ():
            requirement = Requirement(text)
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                continue
            version = _version(requirement.name)
            if version is None or not requirement.specifier.contains(version, prereleases=True):
                there = f"{requirement.name} is {version}" if version else f"{requirement.name} is not installed"
                text = f"{package} {_version(package)} needs {requirement.name}{requirement.specifier}, but {there}"
                todo = f'pip install "{requirement.name}{requirement.specifier}" {package}, both in one command'
                findings.append(Finding("warn", "versions", text, todo))
    return findings


def _torchrun_parser():  # type: ignore[no-untyped-def]  # torch leaves it untyped
    from torch.distributed.run import get_args_parser

    return get_args_parser()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def gpu_findings(local_world_size: int | None) -> list[Finding]:
    """GPUs that torch can use, against those that the machine has and those that this job's processes need."""
    present, visible = count_gpus(), visible_gpus()
    missing = gpus_missing(os.environ, visible)
    if missing:
        return [Finding("fail", "GPUs", missing, GPUS_MISSING_TODO)]
    if present and not visible:
        build = torch.version.cuda or "the CPU"
        return [
            Finding(
                "fail",
                "GPUs",
                f"{present} are there, but torch {torch.__version__} (built for {build}) can use none",
                "install a torch build for this driver's CUDA (`nvidia-smi` shows it)",
            )
        ]
    if not visible:
        cores = len(os.sched_getaffinity(0))
        return [Finding("ok", "GPUs", f"none; training runs on {cores} CPU core{'s' if cores > 1 else ''}")]
    names = sorted({torch.cuda.get_device_name(i) for i in range(visible)})
    memory = min(torch.cuda.get_device_properties(i).total_memory for i in range(visible)) / 2**30
    text = f"{visible} x {' and '.join(names)}, {memory:.0f} GiB"
    findings = [Finding("ok", "GPUs", text)]
    granted, said_by = granted_gpus(os.environ)
    needed = visible if local_world_size is None else local_world_size
    # One alone may be this task's own, beside other tasks with theirs.
    if 1 < visible < min(granted, needed):
        todo = "make the others visible (CUDA_VISIBLE_DEVICES), or start fewer processes"
        findings = [Finding("fail", "GPUs", f"{text}, but {granted} were given to the job ({said_by})", todo)]
    if needed < visible:
        findings = [
            Finding(
                "warn",
                "GPUs",
                f"{text}; processes on this machine: {needed}, a GPU each",
                f"start {visible} processes a machine, or hide the others with CUDA_VISIBLE_DEVICES",
            )
        ]
    shm = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").exists() else None
    if shm is not None and shm < SHM_BYTES:
        findings.append(
            Finding(
                "warn",
                "shared memory",
                f"/dev/shm has {shm / 2**20:.0f} MiB; data loader processes and NCCL hand data over through it",
                "start the container with --shm-size=8g (Docker) or --ipc=host, or data.num_workers=0",
            )
        )
    return findings


def disk_finding(spec: Spec | None, plan: Plan | None) -> Finding:
    """Free space for the run folder against what the plan will write, the stored activations included."""
    place = _existing(output_of(spec) if spec else Path())
    free = shutil.disk_usage(place).free
    if spec is None or plan is None:
        return Finding("ok", "disk", f"{_gib(free)} free at {place}")
    manifest = plan.widest.manifest
    # A new checkpoint is complete before an old one goes; the exported model comes on top.
    model_bytes = (manifest.num_trainable + manifest.num_frozen) * 4
    needed = plan.costs.checkpoint_bytes * (spec.checkpoint.keep + 1) + model_bytes
    text = f"{_gib(free)} free at {place}, {_gib(needed)} needed ({spec.checkpoint.keep} checkpoints and the model)"
    if free < needed:
        return Finding("fail", "disk", text, "choose another output=..., a smaller checkpoint.keep, or free some space")
    if not any(decision.use for decision in plan.cache):
        return Finding("ok", "disk", text)
    root, cache = _existing(cache_root(spec)), most_cache_bytes(plan)
    text += f"; the cache takes at most {_gib(cache)} at {root}"
    shares_disk = root.stat().st_dev == place.stat().st_dev
    if shutil.disk_usage(root).free < cache + (needed if shares_disk else 0):
        todo = (
            "without room the run goes on without a cache; cache.folder=... puts it on another disk, cache=off ends it"
        )
        return Finding("warn", "disk", text, todo)
    return Finding("ok", "disk", text)


def most_cache_bytes(plan: Plan) -> int:
    """Bytes that stored activations can take: of all tokens at the model's width, never more than `cache.quota`.

    What a CNN stores is known only once it is cut, so that for images it is the quota, as for a model without vectors.
    """
    cache, manifest = plan.spec.cache, plan.widest.manifest
    # Most vectors of a transformer, those of its norms and biases, are as wide as what goes from block to block.
    widths = Counter(record.shape[0] for record in manifest.records if len(record.shape) == 1)
    if plan.data.max_length is None or not widths:
        return cache.quota
    width = widths.most_common(1)[0][0]
    tokens = sum(plan.data.num_rows.values()) * plan.data.max_length
    return min(cache.quota, tokens * width * (2 if cache.dtype == "bf16" else 4))


def _existing(path: Path) -> Path:
    path = path.absolute()
    return next(p for p in (path, *path.parents) if os.access(p, os.F_OK))


def _gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"


def hub_finding() -> Finding:
    """Whether models and data can come from the hub, or only from the cache."""
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return Finding("ok", "hub", "offline (HF_HUB_OFFLINE): models and data come from the cache only")
    endpoint = urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    proxy = os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy")
    try:
        # A proxy is often written without http://
        address = urlparse(proxy if "//" in proxy else f"//{proxy}") if proxy else endpoint
        port = address.port or (80 if address.scheme == "http" else 443)
        socket.create_connection((address.hostname or "", port), timeout=HUB_TIMEOUT_S).close()
    except (OSError, ValueError) as error:  # ValueError: a port that is none
        return Finding(
            "warn",
            "hub",
            f"{endpoint.hostname} can't be reached from here{' by the proxy of HTTPS_PROXY' if proxy else ''} "
            f"({getattr(error, 'strerror', None) or error})",
            "fetch model and data where there is internet (`dist-finetune prepare`), then set HF_HUB_OFFLINE=1 so that "
            "nothing waits for it",
        )
    return Finding("ok", "hub", f"{endpoint.hostname} can be reached")


def wandb_finding(spec: Spec | None) -> Finding:
    """Whether W&B has a login here, by what a run would ask. The key is not shown."""
    wanted = spec.track.wandb if spec else "auto"
    mode = os.environ.get("WANDB_MODE") if wanted == "auto" else None
    if wanted == "off" or mode == "disabled":
        return Finding("ok", "W&B", f"off ({'WANDB_MODE' if mode else 'track.wandb'})")
    is_logged_in = has_login()
    if wanted == "online" and not is_logged_in:
        return Finding("fail", "W&B", "track.wandb is online, but there is no login", "run `wandb login` once")
    if "offline" in (mode, wanted):
        return Finding("ok", "W&B", "offline; upload later with `wandb sync`")
    if not is_logged_in:
        return Finding(
            "warn", "W&B", "no login, so the run stays offline", "run `wandb login` once, or track.wandb=offline"
        )
    return Finding("ok", "W&B", "logged in")
