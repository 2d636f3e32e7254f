"""The first minute of a job: all ranks meet, and one number travels through all of them, before anything is loaded.

A rank that is absent, or a network interface that was guessed wrong, would otherwise show as a hang of half an hour.
"""

import array
import fcntl
import os
import socket
import struct
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from dist_finetune.errors import UserError
from dist_finetune.launchers.environment import LaunchedAs

ALL_REDUCE_TIMEOUT_S = 60
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


def check_all_reduce(rank: int, world_size: int, device: torch.device) -> None:
    """Sums one number over all ranks on `device`. Raises UserError where it does not come back, or comes back wrong."""
    number = torch.tensor([rank + 1.0], device=device)
    via = f"the network interface to rank 0 is {interface_to(os.environ.get('MASTER_ADDR', '127.0.0.1'))}"
    try:
        work = dist.all_reduce(number, async_op=True)
        work.wait(timedelta(seconds=ALL_REDUCE_TIMEOUT_S))
        total = number.item()
    except RuntimeError as error:
        raise UserError(
            f"rank {rank} on {socket.gethostname()}: the first all-reduce failed: {str(error).splitlines()[0]}; {via}. "
            "Set NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME to the interface that connects the machines"
        ) from None
    if total != world_size * (world_size + 1) / 2:
        raise UserError(f"rank {rank}: an all-reduce of 1 to {world_size} gave {total}; {via}")


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
