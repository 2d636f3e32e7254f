"""Who am I among the processes: join the process group that the launcher made, and agree with every other rank.

The only file that starts or ends a process group. Works alone (one process, a notebook too) and under any launcher that
`dist_finetune.launchers.environment` knows.
"""

import os
import socket
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from dist_finetune.errors import DistFinetuneError, TrainingError, UserError
from dist_finetune.launchers.environment import (
    LaunchedAs,
    cpu_threads,
    set_by_user,
    torch_variables,
    world_from_environment,
)
from dist_finetune.preflight import (
    GPUS_MISSING_TODO,
    check_all_reduce,
    gpus_missing,
    meet,
    open_group,
    versions_that_differ,
    visible_gpus,
    wait_longer,
)
from dist_finetune.run_folder import installed_versions
from dist_finetune.spec import LaunchSpec

T = TypeVar("T")

_files: dist.ProcessGroup | None = None
"""All ranks once more, with the patience that reading and writing files takes; None until `join_world`."""
_num_waiting = 0
_joined: "World | None" = None


@dataclass(frozen=True)
class World:
    """One rank's place in the job, as checked against every other rank."""

    launcher: str
    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    device: torch.device

    @property
    def num_nodes(self) -> int:
        return -(-self.world_size // self.local_world_size)

    @property
    def is_first(self) -> bool:
        """True on the one rank that writes files and speaks to the user."""
        return self.rank == 0


@contextmanager
def join_world(launch: LaunchSpec) -> Iterator[World]:
    """Joins (or, alone, makes) the process group; gloo for CPU tensors, NCCL for CUDA tensors.

    At the end a group that was made here is gone (see `closes_group`), so that the interpreter exits without a warning
    or a hang, and the environment is as before: what a notebook starts next must not take itself for a rank of this
    job. Within another `join_world` it is that one's world. Raises UserError where the launcher's variables and the
    ranks that really arrived disagree, two ranks share a GPU, or a caller's own group takes no tensors of the CPU.
    """
    global _joined
    if _joined:
        yield _joined
        return
    found = world_from_environment(os.environ)
    device = _device(found.local_rank, found.local_world_size)
    _set_cpu_threads(launch, found)
    variables = {**torch_variables(found), **_device_variables(device)}
    if found.world_size == 1:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # never opened: the store lives in this process
        variables = {**variables, **{name: os.environ.get(name, value) for name, value in address.items()}}
    if not torch.cuda.is_available():
        # LOCAL_SIZE: DeepSpeed's stage 3 counts devices in each backward pass, on CPUs else by starting `numactl`
        cpus = {"DS_ACCELERATOR": os.environ.get("DS_ACCELERATOR", "cpu"), "LOCAL_SIZE": str(found.local_world_size)}
        variables = {**variables, **cpus}
    made_group, failed = not dist.is_initialized(), True
    with _environment(variables):
        if made_group:
            store = meet(found, launch.join_timeout) if found.world_size > 1 else dist.HashStore()
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            open_group(found, store, backend, launch.join_timeout)
        else:
            _refuse_group_without_cpu()
        try:
            world = World(
                found.launcher, found.rank, found.local_rank, found.world_size, found.local_world_size, device
            )
            _check_ranks(world)
            check_all_reduce(world.rank, world.world_size, world.device, launch.join_timeout)
            if made_group:
                wait_longer(launch.timeout)
            _joined = world
            with _files_group(launch.file_timeout) if world.world_size > 1 else nullcontext():
                yield world
            failed = False
        finally:
            _joined = None
            # a caller's own process group is left as it is
            if made_group and dist.is_initialized() and closes_group(device, found.world_size, failed):
                dist.destroy_process_group()


def closes_group(device: torch.device, world_size: int, failed: bool) -> bool:
    """Whether a rank that ends closes its process group. NCCL waits for what is under way, and so for all other ranks
    (pytorch#141510): one that fails alone would never get to say why, nor end, and so hold the job. The end of its
    process aborts what it leaves."""
    return not (failed and world_size > 1 and device.type == "cuda")


@contextmanager
def _files_group(timeout_s: float) -> Iterator[None]:
    """The group through which ranks agree on what one of them read or wrote. Gloo, as they agree on host objects."""
    global _files
    group: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
    before, _files = _files, group
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group(_files)
        _files = before


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _device(local_rank: int, local_world_size: int) -> torch.device:
    missing = gpus_missing(os.environ, visible_gpus())
    if missing:
        raise UserError(f"{missing}: {GPUS_MISSING_TODO}")
    if not torch.cuda.is_available():
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    if visible >= local_world_size:
        index = local_rank
    elif visible == 1:
        index = 0  # the scheduler gave each task one GPU of its own; _check_ranks proves that they differ
    else:
        raise UserError(
            f"{local_world_size} processes on {socket.gethostname()}, but {visible} visible GPUs: "
            f"start {visible} processes a node, or make more GPUs visible (CUDA_VISIBLE_DEVICES)"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _device_variables(device: torch.device) -> dict[str, str]:
    """Accelerate and DeepSpeed take the local rank for the number of the GPU, which it isn't where each task sees its
    own GPU only; DeepSpeed insists that mpirun's variable says the same."""
    if device.type != "cuda":
        return {}
    variables = {"LOCAL_RANK": str(device.index)}
    if "OMPI_COMM_WORLD_LOCAL_RANK" in os.environ:
        variables["OMPI_COMM_WORLD_LOCAL_RANK"] = str(device.index)
    return variables


def _set_cpu_threads(launch: LaunchSpec, found: LaunchedAs) -> None:
    if launch.cpu_threads != "auto":
        torch.set_num_threads(launch.cpu_threads)
    elif "OMP_NUM_THREADS" not in os.environ or not set_by_user("OMP_NUM_THREADS", found):
        torch.set_num_threads(cpu_threads(found, os.environ, len(os.sched_getaffinity(0))))


def _refuse_group_without_cpu() -> None:
    """Ranks agree while they train on whether to stop, by numbers that are on the CPU."""
    backends = dist.get_backend_config()
    if "cpu:" not in backends:
        raise UserError(
            f"the process group that is there ({backends}) takes no tensors of the CPU: start it with "
            'dist.init_process_group("cpu:gloo,cuda:nccl"), or leave it to this package'
        )


def _check_ranks(world: World) -> None:
    """Every rank there once, every GPU used once, as many ranks on each machine."""
    if dist.get_world_size() != world.world_size or dist.get_rank() != world.rank:
        raise UserError(
            f"the process group has rank {dist.get_rank()} of {dist.get_world_size()}, {world.launcher}'s variables "
            f"say rank {world.rank} of {world.world_size}: start one launcher only, without variables of another"
        )
    gpu = str(torch.cuda.get_device_properties(world.device).uuid) if world.device.type == "cuda" else None
    places = gather_objects((world.rank, world.local_world_size, socket.gethostname(), gpu))
    if sorted(p[0] for p in places) != list(range(world.world_size)):
        raise UserError(f"ranks {sorted(p[0] for p in places)} arrived, 0 to {world.world_size - 1} were expected")
    other = next((p for p in places if p[1] != places[0][1]), None)
    if other:
        raise UserError(
            f"{places[0][1]} ranks on {places[0][2]} (rank 0), but {other[1]} on {other[2]} (rank {other[0]}): start "
            "as many on each machine (torchrun --nproc-per-node, srun --ntasks-per-node)"
        )
    bare = next((p for p in places if p[3] is None), None)
    if bare and any(p[3] for p in places):
        raise UserError(f"rank {bare[0]} on {bare[2]} sees no GPU, others do: {GPUS_MISSING_TODO}")
    gpus = [(host, uuid) for _, _, host, uuid in places if uuid]
    shared = sorted({g for g in gpus if gpus.count(g) > 1})
    if shared:
        ranks = [p[0] for p in places if (p[2], p[3]) == shared[0]]
        raise UserError(
            f"ranks {ranks} on {shared[0][0]} would share one GPU ({shared[0][1]}): "
            "give each task its own (srun --gpus-per-task=1) or let all tasks of a node see all its GPUs"
        )


def settled_s(device: torch.device) -> float:
    """The time, in seconds of a clock that only goes forward, once the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def waits_for_files() -> bool:
    """True within `patience`, where `launch.file_timeout` counts: a rank that takes long there does not hang."""
    return _num_waiting > 0


@contextmanager
def patience() -> Iterator[None]:
    """Around what may wait for files, on this rank or another. All ranks enter it together, as in `on_first`."""
    global _num_waiting
    _num_waiting += 1
    try:
        yield
    finally:
        _num_waiting -= 1


def gather_objects(value: T) -> list[T]:
    """`value` of every rank, in rank order, on every rank."""
    out: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(out, value, group=_files if waits_for_files() else None)
    return out


def gather_to_first(value: T) -> list[T]:
    """`value` of every rank, in rank order, on the first one; an empty list elsewhere."""
    out: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, out, dst=0, group=_files if waits_for_files() else None)
    return out or []


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Element-wise sum of `values` over all ranks, in place."""
    dist.all_reduce(values)
    return values


def together(work: Callable[[], T]) -> T:
    """Runs `work` on every rank at once; one rank's failure is everybody's, so that no rank waits for a dead one.

    Raises on every rank the DistFinetuneError of the lowest rank that failed; what a disk refused is one, too.
    """
    with patience():
        result, error = _attempt(work)
        errors = [e for e in gather_objects(error) if e is not None]
    if errors:
        raise errors[0]
    return result  # type: ignore[return-value]


def on_first(world: World, work: Callable[[], T]) -> T:
    """Runs `work` on rank 0 only and returns its result, or raises its DistFinetuneError, on every rank."""
    with patience():
        result, error = _attempt(work) if world.is_first else (None, None)
        result, error = _from_first((result, error))
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def wait_for_first() -> None:
    """Returns once the first rank calls it too, or is gone. Collective."""
    with patience(), suppress(RuntimeError):
        _from_first(None)


def _attempt(work: Callable[[], T]) -> tuple[T | None, DistFinetuneError | None]:
    try:
        return work(), None
    except DistFinetuneError as error:
        return None, error
    except (OSError, SafetensorError) as error:  # safetensors has its own for a full disk
        told = TrainingError(f"{error} (on {socket.gethostname()}). Mend that, and start again the same way")
        told.add_note("".join(traceback.format_exception(error)))  # for --debug; a cause would not get to other ranks
        return None, told


def _from_first(value: T) -> T:
    box = [value]
    dist.broadcast_object_list(box, src=0, group=_files)
    return box[0]


def require_same(label: str, value: str, hint: str) -> None:
    """Raises UserError unless `value` is the same on every rank; `hint` says what to do where it is not."""
    values = gather_objects(value)
    if len(set(values)) > 1:
        other = next(rank for rank, v in enumerate(values) if v != values[0])
        raise UserError(
            f"{label} differs between ranks: rank 0 has {values[0]}, rank {other} has {values[other]}. {hint}"
        )


def require_same_versions() -> None:
    """Raises UserError, on every rank, that names what ranks have installed in different versions. Collective."""
    differ = versions_that_differ(gather_objects(installed_versions()))
    if differ:
        raise UserError(f"ranks run different software: {differ}. Give every machine the same environment")
