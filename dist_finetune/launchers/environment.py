"""Who am I: rank and world size, read from whatever started this process; pure functions over an environment mapping.

A process that guesses wrong here trains alone while it looks distributed, so anything incomplete or contradictory is
refused.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dist_finetune.errors import UserError

OWN_LAUNCHER = "DIST_FINETUNE_LAUNCHER"
GPUS_PER_NODE = "DIST_FINETUNE_GPUS_PER_NODE"  # what `submit` asked for, in the job script; what `run` counted
TORCH_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
ACCELERATE_PREFIXES = ("ACCELERATE_", "FSDP_", "MEGATRON_LM_", "PARALLELISM_CONFIG_")
# Logging and CPU affinity change no number.
KEPT = ("ACCELERATE_LOG_LEVEL", "ACCELERATE_DEBUG_MODE", "ACCELERATE_ENABLE_RICH", "ACCELERATE_CPU_AFFINITY")
# Names of rank, size, local rank and local size, by the kind of mpirun.
MPI_NAMES = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)


@dataclass(frozen=True)
class LaunchedAs:
    """This process's place in the job, and where the ranks meet (None for a single process)."""

    launcher: str
    """torchrun, accelerate launch, deepspeed, run, srun, mpirun, variables (set by hand) or none."""
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    node_rank: int = 0
    master_addr: str | None = None
    master_port: int | None = None


@dataclass(frozen=True)
class Tasks:
    """The tasks of an srun step or an mpirun, of which this process is a part."""

    starter: str
    rank: int
    size: int
    local_rank: int
    local_size: int
    node_rank: int


def world_from_environment(env: Mapping[str, str]) -> LaunchedAs:
    """The place of this process in its job, from the variables of the launcher that started it.

    Raises UserError where variables are missing, out of range, or say different things about the world.
    """
    tasks = _tasks(env)
    if any(env.get(name) for name in TORCH_NAMES):
        launched = _from_torch_variables(env)
        _check_against_tasks(launched, tasks, env)
    elif tasks and tasks.size > 1:
        launched = _from_tasks(env, tasks)
    else:
        _refuse_one_of_many(env)
        return LaunchedAs("none")
    _check_ranges(launched)
    return launched


def torch_variables(launched: LaunchedAs) -> dict[str, str]:
    """The variables that torch, Accelerate and DeepSpeed all read, saying what `launched` says.

    Raises UserError where several ranks have no address to meet at.
    """
    variables = {
        "RANK": str(launched.rank),
        "LOCAL_RANK": str(launched.local_rank),
        "WORLD_SIZE": str(launched.world_size),
        "LOCAL_WORLD_SIZE": str(launched.local_world_size),
    }
    if launched.master_addr is None or launched.master_port is None:
        if launched.world_size > 1:
            raise UserError(
                f"{launched.launcher} started {launched.world_size} processes, but MASTER_ADDR or MASTER_PORT "
                "is missing, so they can't meet. Export both before the start (the first machine's name and a free "
                "port), or start one torchrun on each machine."
            )
        return variables
    return {**variables, "MASTER_ADDR": launched.master_addr, "MASTER_PORT": str(launched.master_port)}


def granted_gpus(env: Mapping[str, str]) -> tuple[int, str]:
    """GPUs that this machine's part of the job was given by its scheduler, and which variable says so; else 0.

    `CUDA_VISIBLE_DEVICES` that is empty or -1 (to SLURM NoDevFiles) hides them all on purpose, as does a job that was
    submitted without any.
    """
    if env.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1", "NoDevFiles"):
        return 0, "CUDA_VISIBLE_DEVICES"
    for name in (GPUS_PER_NODE, "SLURM_GPUS_ON_NODE"):
        found = re.search(r"(\d+)$", env.get(name, ""))
        if found:
            return int(found[1]), "nvidia-smi" if name == GPUS_PER_NODE and env.get(OWN_LAUNCHER) == "run" else name
    return 0, ""


def cpu_threads(launched: LaunchedAs, env: Mapping[str, str], num_cores: int) -> int:
    """Threads of one rank where the config leaves them open: its share of the `num_cores` that it may run on.

    SLURM says how many cores a task has, which need not be bound to them; a launcher in a task shares them out.
    """
    tasks, per_task = _tasks(env), env.get("SLURM_CPUS_PER_TASK", "")
    if tasks is None or tasks.starter != "srun" or not per_task.isdigit():
        return max(1, num_cores // launched.local_world_size)
    ranks_per_task = 1 if launched.launcher == "srun" else launched.local_world_size
    return max(1, min(num_cores, int(per_task)) // ranks_per_task)


def set_by_user(name: str, launched: LaunchedAs) -> bool:
    """Whether a variable of this process was there before its launcher started, rather than set by it.

    torchrun (and so `accelerate launch`) sets OMP_NUM_THREADS=1 for several processes.
    """
    if launched.launcher not in ("torchrun", "accelerate launch"):
        return True
    before = _parents_environment()
    return before is None or name in before


def _parents_environment() -> dict[str, str] | None:
    """What this process's launcher was started with, which Linux keeps; None where it can't be read."""
    try:
        entries = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    return dict(os.fsdecode(entry).partition("=")[::2] for entry in entries)


def refuse_run_in_many(env: Mapping[str, str]) -> None:
    """Raises UserError where a launcher started `run` itself several times: each would train a job of its own."""
    tasks = _tasks(env)
    starter, size = (tasks.starter, tasks.size) if tasks else ("", 1)
    if size == 1 and env.get("RANK") and env.get("WORLD_SIZE"):
        starter, size = _launcher_name(env), _number(env, "WORLD_SIZE")
    if size > 1:
        raise UserError(
            f"{starter} started this command {size} times, which would be {size} separate trainings. `dist-finetune "
            f"run` starts its processes itself, on one machine; under {starter} start `dist-finetune train CONFIG`."
        )


def scrubbed(env: Mapping[str, str]) -> list[str]:
    """Names to remove from the environment before an Accelerator of our own is built, so that it reads none of them."""
    return [name for name in env if name.startswith(ACCELERATE_PREFIXES) and name not in KEPT]


def first_host(nodelist: str) -> str:
    """The first host of a SLURM node list: `gpu[03-05,9],login1` gives `gpu03`."""
    found = re.match(r"([^\[,]+)(?:\[([^\]]+)\])?([^\[,]*)", nodelist.strip())
    if not found:
        raise UserError(f"{nodelist!r} is no SLURM node list such as gpu[01-04]")
    prefix, numbers, suffix = found.groups()
    return prefix + (re.split("[-,]", numbers)[0] if numbers else "") + suffix


def _from_torch_variables(env: Mapping[str, str]) -> LaunchedAs:
    missing = [name for name in TORCH_NAMES if not env.get(name)]
    if missing:
        there = ", ".join(f"{name}={env[name]}" for name in TORCH_NAMES if env.get(name))
        raise UserError(
            f"the environment has {there}, but not {' and '.join(missing)}: it is unclear "
            "which of how many processes this is. Set all of RANK, WORLD_SIZE and LOCAL_RANK (0 where each machine "
            "runs one process), or none of them."
        )
    rank, world_size, local_rank = (_number(env, name) for name in TORCH_NAMES)
    address = env.get("MASTER_ADDR") or None
    port = _number(env, "MASTER_PORT") if env.get("MASTER_PORT") else None
    # deepspeed's launcher writes LOCAL_SIZE, the others LOCAL_WORLD_SIZE; the other name is what its caller had left.
    size_names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")
    own_first = reversed(size_names) if _launcher_name(env) == "deepspeed" else size_names
    size_name = next((name for name in own_first if env.get(name)), None)
    if size_name:
        local_world_size = _number(env, size_name)
    elif world_size == 1 or address in ("127.0.0.1", "localhost", "::1"):
        local_world_size = world_size
    else:
        raise UserError(
            f"WORLD_SIZE is {world_size}, but LOCAL_WORLD_SIZE is missing: set it to the number of processes "
            "on this machine"
        )
    node_name = next((name for name in ("GROUP_RANK", "CROSS_RANK") if env.get(name)), None)
    node_rank = _number(env, node_name) if node_name else rank // max(local_world_size, 1)
    if world_size > 1 and (address is None or port is None):
        absent = "MASTER_ADDR" if address is None else "MASTER_PORT"
        raise UserError(
            f"WORLD_SIZE is {world_size}, but {absent} is missing, so the processes can't meet. Set it, "
            "or start with torchrun, accelerate launch or `dist-finetune run`, which do."
        )
    return LaunchedAs(_launcher_name(env), rank, local_rank, world_size, local_world_size, node_rank, address, port)


def _launcher_name(env: Mapping[str, str]) -> str:
    if env.get(OWN_LAUNCHER):
        return env[OWN_LAUNCHER]
    if env.get("TORCHELASTIC_RUN_ID"):
        return "accelerate launch" if env.get("ACCELERATE_MIXED_PRECISION") else "torchrun"
    return "deepspeed" if env.get("CROSS_SIZE") and env.get("LOCAL_SIZE") else "variables"


def _tasks(env: Mapping[str, str]) -> Tasks | None:
    """The srun step or mpirun around this process; None outside of any."""
    if env.get("SLURM_PROCID") and not _is_batch_script(env):
        size_name = next((n for n in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS") if env.get(n)), None)
        size = _number(env, size_name) if size_name else 1
        node_rank = _number(env, "SLURM_NODEID") if env.get("SLURM_NODEID") else 0
        local_rank = _number(env, "SLURM_LOCALID") if env.get("SLURM_LOCALID") else 0
        return Tasks(
            "srun", _number(env, "SLURM_PROCID"), size, local_rank, _slurm_local_size(env, size, node_rank), node_rank
        )
    for names in MPI_NAMES:
        if env.get(names[1]):
            missing = [name for name in names if not env.get(name)]
            if missing and _number(env, names[1]) > 1:
                raise UserError(
                    f"{names[1]} is {env[names[1]]}, but {' and '.join(missing)} is missing: not a whole mpirun"
                )
            rank, size, local_rank, local_size = (_number(env, n) if env.get(n) else 0 for n in names)
            return Tasks("mpirun", rank, size, local_rank, local_size, rank // max(local_size, 1))
    return None


def _is_batch_script(env: Mapping[str, str]) -> bool:
    """sbatch sets SLURM_PROCID=0 for the script itself, which runs once; only srun makes steps."""
    return bool(env.get("SLURM_JOB_ID")) and not env.get("SLURM_STEP_ID")


def _slurm_local_size(env: Mapping[str, str], size: int, node_rank: int) -> int:
    """Tasks on this node; SLURM writes `4(x2),1` for two nodes with four tasks and a third with one."""
    for name in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE"):
        if env.get(name):
            counts: list[int] = []
            for part in env[name].split(","):
                found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
                if not found:
                    raise UserError(f"{name}={env[name]!r} is not what SLURM writes, such as 4(x2)")
                counts += [int(found[1])] * int(found[2] or 1)
            return counts[min(node_rank, len(counts) - 1)]
    nodes_name = next((n for n in ("SLURM_STEP_NUM_NODES", "SLURM_NNODES") if env.get(n)), None)
    return size // _number(env, nodes_name) if nodes_name else size


def _from_tasks(env: Mapping[str, str], tasks: Tasks) -> LaunchedAs:
    """One process for each task: srun's and mpirun's own numbers are ranks."""
    address, port = env.get("MASTER_ADDR"), env.get("MASTER_PORT")
    if tasks.starter == "srun":
        # Read here, in each task: a job script expands SLURM's variables once, on its first node.
        nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or env.get("SLURM_NODELIST")
        address = address or (first_host(nodes) if nodes else None)
        port = port or str(_slurm_port(env))
    if not address or not port:
        raise UserError(
            f"{tasks.starter} started {tasks.size} processes, but they have no address to meet at. Give them "
            "MASTER_ADDR (the first machine's name) and MASTER_PORT (a free port): "
            "mpirun -x MASTER_ADDR=node1 -x MASTER_PORT=29511 ..., or start one torchrun on each machine."
        )
    port_number = _number({"MASTER_PORT": port}, "MASTER_PORT")
    return LaunchedAs(
        tasks.starter, tasks.rank, tasks.local_rank, tasks.size, tasks.local_size, tasks.node_rank, address, port_number
    )


def _slurm_port(env: Mapping[str, str]) -> int:
    """A port that all tasks of a step agree on and that another job on the node is unlikely to hold."""
    job, step = (int(env[n]) if env.get(n, "").isdigit() else 0 for n in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return 10_000 + (job * 10 + step) % 20_000


def _check_against_tasks(launched: LaunchedAs, tasks: Tasks | None, env: Mapping[str, str]) -> None:
    """A launcher in each task makes tasks x its processes, or fewer where an elastic torchrun (`--nnodes 1:4`) lost
    machines; variables set by hand make one process a task."""
    if tasks is None or tasks.size == 1:
        return
    by_hand = launched.launcher == "variables"
    expected = tasks.size if by_hand else tasks.size * launched.local_world_size
    spans_machines = bool(env.get("TORCHELASTIC_RUN_ID")) and env.get("GROUP_WORLD_SIZE", "1") != "1"
    if launched.world_size != expected and not (spans_machines and launched.world_size < expected):
        raise UserError(
            f"{tasks.starter} started {tasks.size} tasks, but in this one WORLD_SIZE is {launched.world_size} "
            f"({launched.launcher}): that would be separate trainings side by side, not one of {expected} processes. "
            "Start one torchrun a node with --nnodes and the same --rdzv-endpoint, or leave RANK and WORLD_SIZE unset "
            f"and let {tasks.starter} start `dist-finetune train` once for each process."
        )
    if by_hand and launched.rank != tasks.rank:
        raise UserError(
            f"RANK is {launched.rank}, but this is task {tasks.rank} of {tasks.starter}. A job script that writes "
            "RANK=$SLURM_PROCID sets the same rank everywhere, as it is read once; leave RANK unset."
        )


def _check_ranges(launched: LaunchedAs) -> None:
    problems = []
    if launched.world_size < 1 or not 0 <= launched.rank < launched.world_size:
        problems.append(f"rank {launched.rank} does not exist in a world of {launched.world_size}")
    if not 0 <= launched.local_rank < launched.local_world_size:
        problems.append(
            f"local rank {launched.local_rank} does not exist among {launched.local_world_size} on this machine"
        )
    if launched.local_world_size > launched.world_size:
        problems.append(
            f"{launched.local_world_size} processes on this machine are more than all {launched.world_size}"
        )
    if problems:
        raise UserError(
            f"the variables that {launched.launcher} left disagree: {'; '.join(problems)}. "
            "Unset RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE and start again with one launcher."
        )


def _refuse_one_of_many(env: Mapping[str, str]) -> None:
    """A single process is right only where nothing around it asked for more."""
    # accelerate sets MASTER_ADDR for several; one that was there before it is the site's
    is_sites = env.get("MASTER_ADDR") == (_parents_environment() or {}).get("MASTER_ADDR")
    on_cpu = env.get("ACCELERATE_USE_CPU", "").lower() == "true"
    if env.get("ACCELERATE_MIXED_PRECISION") and env.get("MASTER_ADDR") and (on_cpu or not is_sites):
        raise UserError(
            "accelerate launch was asked for several CPU processes, but started one: with --cpu (or a MULTI_CPU "
            "config) it starts more only through mpirun. "
            "Use `dist-finetune run CONFIG --processes 2`, or accelerate launch --multi_gpu."
        )
    size = env.get("SLURM_NTASKS", "1")
    if _is_batch_script(env) and env.get("SLURM_PROCID") and size.isdigit() and int(size) > 1:
        raise UserError(
            f"the job asks for {size} tasks, but the job script starts this worker once. "
            "Put `srun` in front of it, or use `dist-finetune run` for the GPUs of one machine."
        )


def _number(env: Mapping[str, str], name: str) -> int:
    try:
        return int(env[name])
    except ValueError:
        raise UserError(
            f"{name}={env[name]!r} in the environment is no whole number; the launcher or job script sets it wrongly"
        ) from None
