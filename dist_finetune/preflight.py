"""The first minute of a job: all ranks meet, and one number travels through all of them, before anything is loaded.

A rank that is absent, or a network interface that was guessed wrong, would otherwise show as a hang of half an hour.
"""

import array
import fcntl
import os
import socket
import struct
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from dist_finetune.errors import UserError
from dist_finetune.launchers.environment import LaunchedAs, granted_gpus

CONNECT_SLACK_S = 2.0  # a timeout of torch's own comes first, and says more
SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of a network interface


def meet(found: LaunchedAs, timeout_s: float) -> dist.Store:
    """The store through which all ranks of a job of several have announced themselves.

    Raises UserError, on every rank that is there, that names the absent ranks after `timeout_s` seconds.
    """
    address, port = str(found.master_addr), int(found.master_port or 0)
    # torchrun's agent keeps the store itself, through restarts of the workers too.
    agent_has_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if port == 0:
        raise UserError(
            f"MASTER_PORT is 0, and {found.launcher} chose no port in its place: start it with --standalone on one "
            "machine, or name a free port"
        )
    started = time.monotonic()
    try:
        tcp = dist.TCPStore(
            address,
            port,
            found.world_size,
            is_master=found.rank == 0 and not agent_has_store,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except dist.DistError as error:
        raise UserError(_no_store(found, timeout_s, error)) from None
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"/dist_finetune/attempt_{attempt}", tcp)
    keys = [f"arrived/{rank}" for rank in range(found.world_size)]
    store.set(keys[found.rank], socket.gethostname())
    # Rank 0 takes the store with it when it gives up, so the others look first.
    left_s = max(1.0, timeout_s - (time.monotonic() - started)) + (2.0 if found.rank == 0 else 0.0)
    try:
        store.wait(keys, timedelta(seconds=left_s))
    except dist.DistError:
        raise UserError(_absent_ranks(found, store, keys, timeout_s)) from None
    return store


def _no_store(found: LaunchedAs, timeout_s: float, error: Exception) -> str:
    where = f"{found.master_addr}:{found.master_port}"
    if found.rank == 0:
        reason = str(error).splitlines()[0]
        return f"rank 0 can't listen at {where}, where the ranks meet: {reason}. Use another MASTER_PORT"
    return (
        f"rank {found.rank} on {socket.gethostname()} found nobody at {where} in {timeout_s:.0f} s: rank 0 is absent, "
        "or a firewall or name lookup is in the way. Look at the output of rank 0; launch.join_timeout waits longer"
    )


def _absent_ranks(found: LaunchedAs, store: dist.Store, keys: list[str], timeout_s: float) -> str:
    try:
        absent = [rank for rank, key in enumerate(keys) if not store.check([key])]
    except dist.DistError:
        return f"rank 0 left before all {found.world_size} ranks had arrived; its message names the absent ones"
    nodes = sorted({rank // found.local_world_size for rank in absent})
    return (
        f"rank{'s' if len(absent) > 1 else ''} {', '.join(map(str, absent))} of {found.world_size} did not arrive "
        f"within {timeout_s:.0f} s (node {', '.join(map(str, nodes))}, counted from 0). Look at the output there; "
        "launch.join_timeout waits longer"
    )


def visible_gpus() -> int:
    """GPUs that torch can use on this machine."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def gpus_missing(env: Mapping[str, str], visible: int) -> str | None:
    """What is wrong where the scheduler gave this machine GPUs and torch sees none: it would train on the CPU instead.

    Where it sees some, but too few for the ranks, choosing a device says so.
    """
    granted, said_by = granted_gpus(env)
    if not granted or visible:
        return None
    return (
        f"the job was given {granted} GPU{'s' if granted > 1 else ''} on {socket.gethostname()} ({said_by}), but torch "
        f"{torch.__version__} (built for {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'the CPU'}) sees none"
    )


GPUS_MISSING_TODO = (
    "look at `nvidia-smi` there, and install a torch build for its driver (in a container, start it with GPUs); to "
    "train on the CPU on purpose submit with --gpus-per-node 0, or set CUDA_VISIBLE_DEVICES= (empty)"
)


def open_group(found: LaunchedAs, store: dist.Store, backend: str, timeout_s: float) -> None:
    """Connects all ranks of the job. Until `wait_longer`, collectives wait for `timeout_s` too.

    Raises UserError where a connection is not there by then, mostly for a wrong network interface.
    """
    try:
        dist.init_process_group(
            backend,
            store=store,
            rank=found.rank,
            world_size=found.world_size,
            timeout=timedelta(seconds=timeout_s),
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"rank {found.rank} on {socket.gethostname()} could not connect to the other ranks: "
            f"{str(error).splitlines()[0]}; {interfaces()}. {INTERFACE_TODO}"
        ) from None


def wait_longer(timeout_s: float, group: dist.ProcessGroup | None = None) -> None:
    """Collectives of a group, left out: of the job, wait for `timeout_s` from here on."""
    if hasattr(dist, "set_timeout"):
        dist.set_timeout(timedelta(seconds=timeout_s), group)
    else:  # before torch 2.14
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)


INTERFACE_TODO = (
    "Set GLOO_SOCKET_IFNAME, and NCCL_SOCKET_IFNAME for GPUs, to the interface that connects the machines (`ip -brief "
    "address` lists them; for SLURM in launch.slurm.env), or unset them; launch.join_timeout waits longer"
)


def interfaces() -> str:
    """The network interfaces that ranks use, as chosen by variables, or else by the way to rank 0."""
    chosen = [f"{n}={os.environ[n]}" for n in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if os.environ.get(n)]
    default = f"the network interface to rank 0 is {interface_to(os.environ.get('MASTER_ADDR', '127.0.0.1'))}"
    return f"{' and '.join(chosen)} in use, and {default}" if chosen else default


def check_all_reduce(rank: int, world_size: int, device: torch.device, timeout_s: float) -> None:
    """Sums one number over all ranks on `device`. Raises UserError where it does not come back in time, or wrong.

    The group itself should wait no longer: gloo's can't be closed before.
    """
    number = torch.tensor([rank + 1.0], device=device)
    via = interfaces()
    found: list[float | RuntimeError] = []

    def reduce() -> None:
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)  # a thread begins with the first one
            work = dist.all_reduce(number, async_op=True)
            work.wait(timedelta(seconds=timeout_s))
            found.append(number.item())
        except RuntimeError as error:
            found.append(error)

    # NCCL connects in its first collective, and as long as that waits no timeout of torch's counts.
    thread = threading.Thread(target=reduce, name="first all-reduce", daemon=True)
    thread.start()
    thread.join(timeout_s + CONNECT_SLACK_S)
    total = found[0] if found else f"no answer in {timeout_s:.0f} s"
    if not isinstance(total, float):
        raise UserError(
            f"rank {rank} on {socket.gethostname()}: the first all-reduce failed: {str(total).splitlines()[0]}; {via}. "
            f"{INTERFACE_TODO}"
        )
    if total != world_size * (world_size + 1) / 2:
        raise UserError(f"rank {rank}: an all-reduce of 1 to {world_size} gave {total}; {via}")


def versions_that_differ(by_rank: Sequence[Mapping[str, Any]]) -> str | None:
    """Names what ranks have in different versions, of their `installed_versions`; None where all have the same."""
    flat = [{"python": versions["python"], **versions["packages"]} for versions in by_rank]
    found = []
    for name, first in flat[0].items():
        other = next((rank for rank, versions in enumerate(flat) if versions.get(name) != first), None)
        if other is not None:
            found.append(f"{name} is {first or 'missing'} on rank 0 and {flat[other].get(name)} on rank {other}")
    return "; ".join(found) or None


def interface_to(host: str) -> str:
    """Name and address of the network interface that reaches `host`, such as "eth0 (10.0.0.4)"."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))  # sends nothing
        except OSError as error:
            return f"unknown, as {host} is not found ({error.strerror or error})"
        address = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            request = array.array("b", struct.pack("256s", name.encode()[:15]))
            try:
                fcntl.ioctl(probe.fileno(), SIOCGIFADDR, request)
            except OSError:
                continue  # an interface without an IPv4 address
            if socket.inet_ntoa(request.tobytes()[20:24]) == address:
                return f"{name} ({address})"
    return address
