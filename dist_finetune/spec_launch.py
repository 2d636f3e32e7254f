"""Settings of a SLURM site and of rented machines: sections `launch.slurm` and `launch.cloud` of a config.

Every value ends up in a job script or a task file, so whatever could break out of its line is refused here.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from dist_finetune.durations import parse_bytes, parse_duration_s
from dist_finetune.spec_base import DurationS, PositiveInt, Section, StringList, as_list

SLURM_TIME = re.compile(r"\d+-\d+(:\d+){0,2}|\d+:\d+(:\d+)?")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
SECRET_WORDS = re.compile(r"(?i)(^|_)(api_?key|key|token|secret|password|passwd|credentials?)(_|$)")
# Lines that the job script writes itself; a second one would win in silence.
SHORT_OPTIONS = {
    "A": "account",
    "C": "constraint",
    "D": "chdir",
    "J": "job-name",
    "N": "nodes",
    "a": "array",
    "c": "cpus-per-task",
    "n": "ntasks",
    "o": "output",
    "p": "partition",
    "q": "qos",
    "t": "time",
}
OWN_OPTIONS = {
    *SHORT_OPTIONS.values(),
    *("gpus-per-node", "no-requeue", "ntasks-per-node", "open-mode", "requeue", "signal"),
}
# With these sbatch does something else than to submit this script and answer with the job's id.
NO_SUBMISSION = ("h", "help", "parsable", "test-only", "usage", "V", "version", "W", "wait", "wrap")


def slurm_time(value: Any) -> Any:
    """A time limit as SLURM writes it, from "04:00:00", "2-00:00:00", "90 min" or "4 h".

    Raises ValueError for a bare number, which SLURM takes as minutes and everybody else as seconds.
    """
    text = str(value).strip()
    if SLURM_TIME.fullmatch(text):
        return text
    if text.replace(".", "").isdigit():
        raise ValueError(f'{text} has no unit; write "{text} min", "{text} h" or 04:00:00')
    seconds = round(parse_duration_s(text))
    days, seconds = divmod(seconds, 86400)
    clock = f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"
    return f"{days}-{clock}" if days else clock


def _bytes(value: Any) -> Any:
    return value if value is None else parse_bytes(value)


def _one_line(value: str) -> str:
    if any(ord(c) < 32 or ord(c) == 127 for c in value):
        raise ValueError(f"{value!r} has a line break or a control character, which a job script can't hold")
    return value


def _variables(values: dict[str, str]) -> dict[str, str]:
    for name, value in values.items():
        if not VARIABLE.fullmatch(name):
            raise ValueError(f"{name!r} is no name of an environment variable")
        if SECRET_WORDS.search(name):
            raise ValueError(
                f"{name} looks like a secret, and secrets stay out of configs and job files. Export it where you "
                "submit (SLURM hands it on), or name it under launch.cloud.secrets"
            )
        _one_line(value)
    return values


def _secret_names(names: tuple[str, ...]) -> tuple[str, ...]:
    wrong = [name for name in names if not VARIABLE.fullmatch(name)]
    if wrong:
        raise ValueError(f"takes names of variables such as WANDB_API_KEY, never values; {len(wrong)} are none")
    return names


def _extra_options(lines: tuple[str, ...]) -> tuple[str, ...]:
    for line in lines:
        found = re.match(r"--([a-z][a-z-]*)(?:[= ]|$)|-([a-zA-Z])", line)
        if not found:
            raise ValueError(f'{line!r} is no sbatch option; write each as "--name=value"')
        name = found[1] or SHORT_OPTIONS.get(found[2], found[2])
        if name in NO_SUBMISSION:
            raise ValueError(f"{line!r}: with it sbatch would not just submit the job; leave it out")
        if found[1]:  # sbatch takes an option's beginning for the whole
            name = next((own for own in sorted(OWN_OPTIONS) if own.startswith(name)), name)
        if name in OWN_OPTIONS:
            raise ValueError(f"{line!r}: --{name} is written by submit itself; use its flag or its key of launch.slurm")
        _one_line(line)
    return lines


Line = Annotated[str, Field(min_length=1), AfterValidator(_one_line)]
Lines = Annotated[tuple[Line, ...], BeforeValidator(as_list, json_schema_input_type=str | list[str])]
SlurmTime = Annotated[str, BeforeValidator(slurm_time)]
Variables = Annotated[dict[str, str], AfterValidator(_variables)]


class SlurmSpec(Section):
    """What a SLURM site wants to know; flags of `submit` win over partition and time."""

    time: SlurmTime = "04:00:00"
    """Time limit of one attempt, such as 04:00:00 or "90 min"; at the limit the run saves and is queued again."""
    partition: Line | None = None
    """Where the job waits, as `sinfo` lists them."""
    account: Line | None = None
    """Who is billed."""
    qos: Line | None = None
    """Quality of service."""
    constraint: Line | None = None
    """Features that nodes must have, such as "a100&ib"."""
    gpu_type: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")] | None = None
    """SLURM's name of the GPU, where the site has several."""
    gpu_memory: Annotated[int | None, BeforeValidator(_bytes, json_schema_input_type=int | str | None)] = None
    """Memory of one GPU, such as 80GiB, so that the plan can tell whether the run fits."""
    cpus_per_process: PositiveInt = 4
    """CPU cores for each GPU, or for each process where there are none."""
    modules: Lines = ()
    """Environment modules to load first."""
    env: Variables = {}
    """Environment variables of the job, such as NCCL_SOCKET_IFNAME. No secrets."""
    python: Line | None = None
    """Python that has this package on the nodes; left out: the one that submits, in a container "python"."""
    container: Line | None = None
    """Image for srun's --container-image (the pyxis plugin)."""
    container_mounts: Lines = ()
    """host:container folders; the run folder and the data must be among them."""
    offline: bool = False
    """Compute nodes have no internet: only what `prepare` fetched is used (HF_HUB_OFFLINE=1)."""
    max_requeues: Annotated[int, Field(ge=0, le=1000)] = 20
    """How often the job may be queued again after a time limit or a preemption."""
    grace: DurationS | None = None
    """Seconds before the limit at which the run saves; left out: from the size of a checkpoint."""
    extra: Annotated[StringList, AfterValidator(_extra_options)] = ()
    """Further sbatch options, each such as "--reservation=course"."""


class CloudSpec(Section):
    """Rented machines: what `submit --to skypilot|dstack|kubernetes` writes."""

    gpu: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")] | None = None
    """Name of the GPU as the tool knows it, such as A100-80GB; left out: any with the memory that the plan needs."""
    spot: bool = True
    """Machines that can be taken away; the run goes on from its newest checkpoint on others."""
    storage: Line | None = None
    """Where checkpoints outlive the machines: an fsspec URL such as s3://bucket/folder."""
    volume: Line | None = None
    """A volume of SkyPilot or dstack, or a Kubernetes claim, that all machines mount; needed for more than one."""
    image: Line = "pytorch/pytorch:latest"
    """Container image, where `install` installs the package; for Kubernetes one that has it."""
    install: Line = "pip install ."
    """Command that installs this package on a machine, in a copy of the working folder; in a pod only if given."""
    autostop: Annotated[int, Field(ge=1)] = 10
    """Minutes without work after which the machines are given back."""
    max_hours: Annotated[float, Field(gt=0)] | None = None
    """Ends the job after so long, whatever happens; on SkyPilot counted anew where another machine takes over."""
    disk_gb: PositiveInt = 100
    """Disk of a machine, in GB."""
    secrets: Annotated[StringList, AfterValidator(_secret_names)] = ()
    """Names of environment variables with secrets, such as WANDB_API_KEY; values stay where they are."""
    env: Variables = {}
    """Further environment variables. No secrets."""
    kubernetes_secret: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$")] = "dist-finetune"
    """Kubernetes Secret that holds `secrets` by their names."""
    kubernetes_kind: Literal["job", "trainjob", "pytorchjob"] = "job"
    """An Indexed Job with a headless Service, or Kubeflow's TrainJob (v2) or PyTorchJob (v1)."""
