"""What the command line of `submit` asks for beside the config, checked before anything heavy is imported."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_finetune.errors import UserError, did_you_mean
from dist_finetune.launchers.cloud import TOOLS
from dist_finetune.spec_launch import slurm_time

TARGETS = ("slurm", *TOOLS)


@dataclass(frozen=True)
class Request:
    to: str = "slurm"
    nodes: int = 1
    gpus_per_node: int = 1
    processes_per_node: int | None = None
    """Only with no GPUs: processes that each node starts on its CPUs."""
    gpu_memory_bytes: int | None = None
    time: str | None = None
    partition: str | None = None
    sweep: tuple[str, ...] = ()
    price: str | None = None
    dry_run: bool = False
    fresh: bool = False


def check_request(**options: Any) -> Request:
    """The request of these options. Raises UserError for flags that are wrong or that would have no effect."""
    request = Request(**options)
    if request.to not in TARGETS:
        raise UserError(f"--to {request.to}: no such target. {did_you_mean(request.to, TARGETS)}")
    if request.processes_per_node is not None and request.gpus_per_node:
        raise UserError(
            f"--processes-per-node {request.processes_per_node} with {request.gpus_per_node} GPUs a node: each process "
            "has one GPU, so leave it out; --gpus-per-node 0 trains on CPUs"
        )
    if request.gpu_memory_bytes is not None and not request.gpus_per_node:
        raise UserError("--gpu-memory has no effect with --gpus-per-node 0, which trains on CPUs; leave it out")
    if request.price and not request.gpus_per_node:
        raise UserError("--price has no effect with --gpus-per-node 0: a price list is of GPUs; leave it out")
    if request.to != "slurm":
        for flag, value in (("--time", request.time), ("--partition", request.partition), ("--sweep", request.sweep)):
            if value:
                raise UserError(f"{flag} is SLURM's and has no effect on {request.to}; leave it out")
    if request.price and not Path(request.price).is_file():
        raise UserError(f"--price {request.price}: no such file")
    if request.time is None:
        return request
    try:
        time = slurm_time(request.time)
    except ValueError as problem:
        raise UserError(f"--time: {problem}") from None
    return Request(**{**options, "time": time})
