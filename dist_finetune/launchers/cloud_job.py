"""A run on rented machines, and what its task files have in common, whichever tool reads them."""

import hashlib
import math
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from ruamel.yaml.scalarstring import LiteralScalarString

from dist_finetune.errors import UserError
from dist_finetune.spec_launch import CloudSpec

RUNS = "/runs"  # where the machines keep run folders
CONFIG_ON_MACHINE = "/etc/dist-finetune/config.yaml"
MAX_NAME = 40
PORT = 29511  # these machines run nothing else
USABLE_SHARE = 0.8  # of a GPU's memory; the driver and the allocator take the rest


@dataclass(frozen=True)
class CloudJob:
    """All that a task file depends on. `config` is the resolved config's path here, `config_text` its content."""

    name: str
    cloud: CloudSpec
    num_nodes: int
    gpus_per_node: int
    processes_per_node: int
    needed_bytes: int
    """What a rank needs at its peak, by the plan."""
    gpu_memory_bytes: int | None
    """Memory that the user asked a GPU to have; None: what the plan needs, and a share to spare."""
    config: Path
    config_text: str


def resource_name(name: str) -> str:
    """A run's name as clouds allow one: lower-case ASCII letters, digits and hyphens, at most 40, a letter first.

    Where much of it is lost, a hash of the whole keeps it apart from other runs' names.
    """
    cleaned = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    cleaned = cleaned if cleaned[:1].isalpha() else f"run-{cleaned}".rstrip("-")
    if len(cleaned) <= MAX_NAME and name.isascii():
        return cleaned
    return f"{cleaned[: MAX_NAME - 9].rstrip('-')}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def memory_gb(job: CloudJob) -> int:
    wanted = job.gpu_memory_bytes or job.needed_bytes / USABLE_SHARE
    return max(8, math.ceil(wanted / 2**30))


def torchrun_lines(job: CloudJob, node_rank: str, master: str) -> list[str]:
    return [
        f"python -m torch.distributed.run --nnodes={job.num_nodes} --nproc-per-node={job.processes_per_node} \\",
        f"  --node-rank={node_rank} --master-addr={master} --master-port={PORT} \\",
        f"  {worker_words(job)}",
    ]


def worker_words(job: CloudJob) -> str:
    return f"-m dist_finetune train {CONFIG_ON_MACHINE} output={RUNS}"


def kept(job: CloudJob, tool: str, start: list[str]) -> list[str]:
    """The command, with its run folder kept in launch.cloud.storage where nothing mounts that for us."""
    if job.num_nodes > 1 and not job.cloud.volume:
        raise UserError(
            f"{job.num_nodes} machines write one run folder together, which launch.cloud.storage can't be: "
            f"with {tool} give launch.cloud.volume, a volume that all of them mount, or use --nodes 1"
        )
    if not job.cloud.storage:
        return start
    folder = shlex.quote(f"{RUNS}/{job.name}")
    url = shlex.quote(f"{job.cloud.storage.rstrip('/')}/{job.name}")
    return [f"python -m dist_finetune.storage {url} {folder} -- \\", *(f"  {line}" for line in start)]


def script(lines: list[str]) -> str:
    return LiteralScalarString("\n".join(lines) + "\n")


def variables(job: CloudJob) -> dict[str, str]:
    return {"PYTHONUNBUFFERED": "1", "PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGUSR1", **job.cloud.env}
