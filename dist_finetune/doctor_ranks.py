"""What `doctor` can only see with all ranks at once. Every function here is collective."""

import contextlib
import os
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from dist_finetune.doctor_local import Finding
from dist_finetune.preflight import interface_to, versions_that_differ
from dist_finetune.run_folder import installed_versions
from dist_finetune.world import World, gather_objects, settled_s

SENT_BYTES = 16 * 2**20
REPEATS = 5
CLOCK_LIMIT_S = 1.0
# A rank below half of the median holds everybody up, as all wait for the slowest.
SLOW_SHARE = 0.5
VISIBLE_AFTER_S = 5.0  # network file systems show another machine's new file with a delay


def rank_findings(world: World) -> Iterator[Finding]:
    """World, rendezvous, all-reduce and clocks, the same on every rank; each as soon as it is known."""
    places = gather_objects((socket.gethostname(), str(world.device)))
    hosts = sorted({host for host, _ in places})
    nodes = f"{world.num_nodes} machine{'s' if world.num_nodes > 1 else ''}"
    kind = "one process" if world.launcher == "none" else f"{world.world_size} ranks by {world.launcher}"
    yield Finding("ok", "ranks", f"{kind} on {nodes} ({', '.join(hosts)}), {world.device.type}")
    if world.world_size == 1:
        return
    interfaces = gather_objects(interface_to(os.environ["MASTER_ADDR"]))
    meeting = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    chosen = {name: os.environ[name] for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME") if name in os.environ}
    told = "".join(f", {name}={value}" for name, value in chosen.items())
    yield Finding("ok", "rendezvous", f"at {meeting} over {', '.join(sorted(set(interfaces)))}{told}")
    yield from agreement_findings(world)
    yield all_reduce_finding(world)
    yield from slow_rank_findings(world)
    yield clock_finding()


def agreement_findings(world: World) -> list[Finding]:
    """What should be the same on all ranks and is not: versions, kinds of GPU."""
    findings = []
    differ = versions_that_differ(gather_objects(installed_versions()))
    if differ:
        findings.append(Finding("fail", "versions", differ, "give every machine the same environment"))
    name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else None
    names = sorted(set(filter(None, gather_objects(name))))
    if len(names) > 1:
        todo = "the slowest sets the pace, the smallest the batch; ask for one kind (launch.slurm.gpu_type)"
        findings.append(Finding("warn", "GPUs", f"ranks have different ones: {', '.join(names)}", todo))
    return findings


def all_reduce_finding(world: World) -> Finding:
    """Right sums, and bytes a second by the usual measure (2 (n-1)/n times the size, over the time of the slowest)."""
    size = SENT_BYTES // 4
    best_s = float("inf")
    for _ in range(REPEATS):
        values = torch.full((size,), float(world.rank + 1), device=world.device)
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(values)
        best_s = min(best_s, settled_s(world.device) - started)
    expected = world.world_size * (world.world_size + 1) / 2
    wrong = [r for r, right in enumerate(gather_objects(bool((values == expected).all()))) if not right]
    if wrong:
        todo = "a GPU, its memory or its network is faulty: leave those machines out"
        return Finding("fail", "all-reduce", f"ranks {wrong} got wrong sums", todo)
    slowest_s = max(gather_objects(best_s))
    rate = 2 * (world.world_size - 1) / world.world_size * SENT_BYTES / slowest_s / 1e9
    return Finding("ok", "all-reduce", f"sums are right, {rate:.2f} GB/s ({SENT_BYTES // 2**20} MiB over all ranks)")


def slow_rank_findings(world: World) -> list[Finding]:
    """Bytes a second between rank 0 and each other rank; the slowest is named, and warned of where it lags behind."""
    buffer = torch.zeros(SENT_BYTES // 4, device=world.device)
    rates = {}
    for other in range(1, world.world_size):
        best_s = float("inf")
        for _ in range(REPEATS):
            dist.barrier()
            started = time.perf_counter()
            if world.rank == 0:
                dist.send(buffer, dst=other)
                dist.recv(buffer, src=other)
            elif world.rank == other:
                dist.recv(buffer, src=0)
                dist.send(buffer, dst=0)
            best_s = min(best_s, settled_s(world.device) - started)
        rates[other] = 2 * SENT_BYTES / gather_objects(best_s)[0] / 1e9
    hosts = gather_objects(socket.gethostname())
    slowest = min(rates, key=lambda rank: rates[rank])
    text = f"slowest is rank {slowest} on {hosts[slowest]}, {rates[slowest]:.2f} GB/s to and from rank 0"
    median = sorted(rates.values())[len(rates) // 2]
    if len(rates) > 1 and rates[slowest] < SLOW_SHARE * median:
        todo = f"others have {median:.2f} GB/s: look at that machine's network, or leave it out (sbatch --exclude)"
        return [Finding("warn", "slowest rank", text, todo)]
    return [Finding("ok", "slowest rank", text)]


def clock_finding() -> Finding:
    """The largest difference between two machines' clocks, seen right after a barrier."""
    spreads = []
    for _ in range(REPEATS):
        dist.barrier()
        times = gather_objects(time.time())
        spreads.append((max(times) - min(times), times.index(min(times)), times.index(max(times))))
    spread, behind, ahead = min(spreads)
    if spread > CLOCK_LIMIT_S:
        text = f"rank {behind}'s clock is {spread:.1f} s behind rank {ahead}'s"
        return Finding("warn", "clocks", text, "have the machines' clocks set (chrony, ntp); logs can't be compared")
    return Finding("ok", "clocks", f"within {max(spread, 0.001):.3f} s")


def shared_folder_finding(world: World, about: str, folder: Path, must_share: bool) -> Finding:
    """Whether all ranks can write into `folder`, and whether it is one folder or one for each machine."""
    token = [f".dist-finetune-doctor-{uuid.uuid4().hex}"]
    dist.broadcast_object_list(token, src=0)
    mine = folder / f"{token[0]}-{world.rank}"
    made = [p for p in (folder, *folder.parents) if not os.access(p, os.F_OK)]
    problem = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        mine.write_text("here")
    except OSError as error:
        problem = f"rank {world.rank} on {socket.gethostname()} can't write there ({error.strerror or error})"
    problems = [p for p in gather_objects(problem) if p]
    missing = 0 if problems else _unseen(folder, token[0], world.world_size)
    unseen = max(gather_objects(missing))
    dist.barrier()
    with contextlib.suppress(OSError):  # what could not be written can't be removed
        mine.unlink(missing_ok=True)
    dist.barrier()
    for path in made:
        try:
            path.rmdir()
        except OSError:  # another rank removed it, or somebody uses it by now
            break
    if problems:
        return Finding("fail", about, f"{folder}: {problems[0]}", "choose a folder that every machine can write into")
    if world.num_nodes == 1:
        return Finding("ok", about, f"{folder} can be written")
    if unseen == 0:
        return Finding("ok", about, f"{folder} is shared by all machines")
    if must_share:
        text = f"{folder} is another folder on each machine"
        return Finding("fail", about, text, "choose output=... on a file system that all machines share")
    return Finding("ok", about, f"{folder} is local to each machine: each fetches and tokenises once")


def _unseen(folder: Path, token: str, world_size: int) -> int:
    """How many of the ranks' files do not show up here."""
    deadline = time.monotonic() + VISIBLE_AFTER_S
    while True:
        count = world_size - len(list(folder.glob(f"{token}-*")))
        if count == 0 or time.monotonic() > deadline:
            return count
        time.sleep(0.2)
