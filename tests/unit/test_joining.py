"""What a rank finds as it joins its job: GPUs that were promised, its share of the cores, the right network."""

import os
import re
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from harness import free_port, start_apart

from dist_finetune import preflight, world
from dist_finetune.errors import UserError
from dist_finetune.launchers.environment import LaunchedAs, cpu_threads, granted_gpus
from dist_finetune.spec import LaunchSpec

REPOSITORY = Path(__file__).parents[2]
PROGRAMS = Path(sys.executable).parent
CPU_CONFIG = REPOSITORY / "launch" / "accelerate" / "cpu_2.yaml"
STEP = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
}
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a GPU here")


def environment(**more: str) -> dict[str, str]:
    """That of a process started by hand, with no GPU hidden and no number of threads chosen."""
    hidden = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
    kept = {k: v for k, v in os.environ.items() if k not in hidden and not k.startswith("SLURM_")}
    path = f"{PROGRAMS}:{os.environ['PATH']}"
    return {**kept, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(REPOSITORY), "PATH": path, **more}


def python(code: str, *, timeout_s: float = 90, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment(**env), capture_output=True, text=True, timeout=timeout_s)


# --- GPUs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env", "granted"),
    [
        ({}, 0),
        ({"SLURM_GPUS_ON_NODE": "4"}, 4),
        ({"SLURM_GPUS_ON_NODE": "gpu:2"}, 2),
        ({"DIST_FINETUNE_GPUS_PER_NODE": "0", "SLURM_GPUS_ON_NODE": "4"}, 0),
        ({"DIST_FINETUNE_GPUS_PER_NODE": "8"}, 8),
        ({"SLURM_GPUS_ON_NODE": "4", "CUDA_VISIBLE_DEVICES": ""}, 0),
        ({"SLURM_GPUS_ON_NODE": "4", "CUDA_VISIBLE_DEVICES": "0,1"}, 4),
    ],
)
def test_gpus_that_a_scheduler_gave(env: dict[str, str], granted: int) -> None:
    assert granted_gpus(env)[0] == granted


@pytest.mark.parametrize(("visible", "index"), [(8, 3), (4, 3), (1, 0)])
def test_a_rank_takes_the_gpu_of_its_number_or_the_only_one(
    visible: int, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = show_gpus(visible, monkeypatch)
    assert world._device(3, local_world_size=4) == torch.device("cuda", index)
    assert taken == [index]


def test_fewer_gpus_than_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = show_gpus(2, monkeypatch)
    with pytest.raises(UserError, match=r"4 processes on \S+, but 2 visible GPUs: start 2 processes a node, or make"):
        world._device(0, local_world_size=4)
    assert taken == []


def show_gpus(count: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """As if torch saw so many GPUs; those that are taken."""
    taken: list[int] = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    monkeypatch.setattr("torch.cuda.set_device", taken.append)
    return taken


@pytest.mark.parametrize(
    ("host", "gpu", "words"),
    [
        ("n0", "GPU-a", r"ranks \[0, 1\] on n0 would share one GPU \(GPU-a\): give each task its own"),
        ("n0", "GPU-b", None),
        ("n1", "GPU-a", None),
        ("n1", None, "rank 1 on n1 sees no GPU, others do: look at `nvidia-smi` there"),
    ],
)
def test_two_ranks_on_one_gpu_are_refused_and_one_without(
    host: str, gpu: str | None, words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: SimpleNamespace(uuid="GPU-a"))
    monkeypatch.setattr(socket, "gethostname", lambda: "n0")
    monkeypatch.setattr(world, "gather_objects", lambda mine: [mine, (1, 2, host, gpu)])
    with pytest.raises(UserError, match=words) if words else nullcontext():
        world._check_ranks(world.World("torchrun", 0, 0, 2, 2, torch.device("cuda", 0)))


@pytest.mark.parametrize(
    ("device", "world_size", "failed", "closes"),
    [
        ("cuda", 2, True, False),  # NCCL would wait for the others, which wait in a collective
        ("cuda", 2, False, True),
        ("cuda", 1, True, True),
        ("cpu", 2, True, True),
    ],
)
def test_a_rank_that_fails_on_a_gpu_does_not_wait_for_the_others(
    device: str, world_size: int, failed: bool, closes: bool
) -> None:
    assert world.closes_group(torch.device(device), world_size, failed) is closes


@without_gpu
def test_a_group_that_is_not_to_be_closed_is_left_to_the_end_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    monkeypatch.setattr(world, "closes_group", lambda *asked: told.append(asked))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    for fault in (None, ValueError("a fault")):
        try:
            with pytest.raises(ValueError, match="a fault") if fault else nullcontext(), world.join_world(LaunchSpec()):
                if fault:
                    raise fault
            assert torch.distributed.is_initialized()
        finally:
            torch.distributed.destroy_process_group()
    assert told == [(torch.device("cpu"), 1, False), (torch.device("cpu"), 1, True)]


JOIN = """
import sys
from dist_finetune.errors import UserError
from dist_finetune.spec import LaunchSpec
from dist_finetune.world import join_world
try:
    with join_world(LaunchSpec(join_timeout=8)) as world:
        print("joined on", world.device)
except UserError as error:
    sys.exit(f"refused: {error}")
"""


@pytest.mark.dist
@without_gpu
def test_machines_with_unlike_numbers_of_ranks_are_refused() -> None:
    same = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    places = [("0", "0", "2"), ("1", "1", "2"), ("2", "0", "1")]
    with ThreadPoolExecutor() as pool:
        ranks = [
            pool.submit(python, JOIN, **same, RANK=rank, LOCAL_RANK=local, LOCAL_WORLD_SIZE=size)
            for rank, local, size in places
        ]
    host = socket.gethostname()
    for rank in ranks:
        assert f"refused: 2 ranks on {host} (rank 0), but 1 on {host} (rank 2): start as many" in rank.result().stderr


@pytest.mark.dist
@without_gpu
@pytest.mark.parametrize(
    ("env", "joins"),
    [
        ({"SLURM_GPUS_ON_NODE": "2"}, False),
        ({"DIST_FINETUNE_GPUS_PER_NODE": "2"}, False),
        ({"SLURM_GPUS_ON_NODE": "2", "CUDA_VISIBLE_DEVICES": ""}, True),
        ({"DIST_FINETUNE_GPUS_PER_NODE": "0", "SLURM_GPUS_ON_NODE": "2"}, True),
        ({}, True),
    ],
)
def test_a_job_with_gpus_does_not_train_on_the_cpu_in_silence(env: dict[str, str], joins: bool) -> None:
    done = python(JOIN, **env)
    if joins:
        assert (done.returncode, done.stdout) == (0, "joined on cpu\n"), done.stderr
        return
    assert done.returncode == 1
    (name,) = env
    assert re.search(rf"refused: the job was given 2 GPUs on {socket.gethostname()} \({name}\), but torch", done.stderr)
    assert "--gpus-per-node 0, or set CUDA_VISIBLE_DEVICES= (empty)" in done.stderr


@pytest.mark.dist
@without_gpu
def test_the_doctor_says_that_gpus_are_missing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dist_finetune", "doctor"]
    env = environment(SLURM_GPUS_ON_NODE="2", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(r"^fail  GPUs +the job was given 2 GPUs on .*sees none\n +-> look at", done.stdout, re.MULTILINE)
    assert re.search(r"^ok    versions", done.stdout, re.MULTILINE), "what can be seen all the same is told"
    assert done.stdout.count("the job was given") == 1
    assert "Traceback" not in done.stderr


# --- cores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("launcher", "env", "cores", "threads"),
    [
        ("torchrun", {}, 16, 4),
        ("torchrun", {**STEP, "SLURM_STEP_NUM_TASKS": "2", "SLURM_CPUS_PER_TASK": "32"}, 64, 8),
        ("srun", {**STEP, "SLURM_CPUS_PER_TASK": "12"}, 64, 12),
        ("srun", STEP, 64, 16),
        ("torchrun", {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_CPUS_PER_TASK": "1"}, 8, 2),
        ("run", {}, 2, 1),
    ],
)
def test_threads_are_a_ranks_share_of_the_cores(launcher: str, env: dict[str, str], cores: int, threads: int) -> None:
    assert cpu_threads(LaunchedAs(launcher, world_size=8, local_world_size=4), env, cores) == threads


THREADS = """
import os, torch
os.sched_getaffinity = lambda _: set(range(8))
from dist_finetune.spec import LaunchSpec
from dist_finetune.world import join_world
with join_world(LaunchSpec()):
    os.write(1, f"threads {torch.get_num_threads()}\\n".encode())
"""
TORCHRUN = ["torchrun", "--standalone", "--nproc-per-node", "2"]


@pytest.mark.dist
@pytest.mark.parametrize(
    ("launch", "env", "threads"),
    [
        (TORCHRUN, {}, 4),
        (TORCHRUN, {"OMP_NUM_THREADS": "1"}, 1),
        pytest.param(["accelerate", "launch", "--config_file", str(CPU_CONFIG)], {}, 4, marks=pytest.mark.slow),
        pytest.param(["deepspeed", "--num_accelerators", "2", "--master_port", "29565"], {}, 4, marks=pytest.mark.slow),
    ],
    ids=["torchrun", "the user's", "accelerate", "deepspeed"],
)
def test_threads_are_the_same_under_every_launcher(
    tmp_path: Path, launch: list[str], env: dict[str, str], threads: int
) -> None:
    """torchrun sets one thread where the user sets none; two ranks of eight cores have four each."""
    (tmp_path / "show.py").write_text(THREADS)
    command = [str(PROGRAMS / launch[0]), *launch[1:], str(tmp_path / "show.py")]
    cpu = {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment(**cpu, **env))
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("threads")] == [f"threads {threads}"] * 2


# --- a caller's own group --------------------------------------------------------------------------------------------


@without_gpu
def test_a_group_that_takes_no_tensors_of_the_cpu_is_refused() -> None:
    """As one of NCCL alone; it is left as it is."""
    torch.distributed.init_process_group("cuda:gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(UserError, match=r"\(cuda:gloo\) takes no tensors of the CPU.*cpu:gloo,cuda:nccl"):
            world.join_world(LaunchSpec()).__enter__()
        assert torch.distributed.is_initialized()
    finally:
        torch.distributed.destroy_process_group()


# --- network ---------------------------------------------------------------------------------------------------------


def ranks_of(code: str, folder: Path, **env: str) -> list[subprocess.CompletedProcess[str]]:
    """What two ranks said that each believe to be on a machine of their own."""
    port = free_port()
    ranks = [start_apart(rank, 2, port, code, folder / f"rank{rank}", **env) for rank in range(2)]
    return [rank.end(120) for rank in ranks]


@pytest.mark.dist
def test_an_interface_that_is_not_there_is_named(tmp_path: Path) -> None:
    started = time.monotonic()
    for rank, done in enumerate(ranks_of(JOIN, tmp_path, GLOO_SOCKET_IFNAME="nosuch0")):
        assert done.returncode == 1, done.stderr
        assert f"refused: rank {rank} on {socket.gethostname()} could not connect to the other ranks" in done.stderr
        assert "GLOO_SOCKET_IFNAME=nosuch0 in use, and the network interface to rank 0 is lo (1" in done.stderr
        assert "Set GLOO_SOCKET_IFNAME" in done.stderr
        assert "Traceback" not in done.stderr
    assert time.monotonic() - started < 60


SILENT = """
import os, time
from dist_finetune import world
if os.environ["RANK"] == "1":  # it connects, and then never answers
    world._check_ranks = lambda _: (time.sleep(12), os._exit(0))
else:
    world._check_ranks = lambda _: None
"""


@pytest.mark.dist
def test_a_first_all_reduce_that_fails_is_told_with_the_interface(tmp_path: Path) -> None:
    first, _ = ranks_of(SILENT + JOIN.replace("=8", "=4"), tmp_path)
    assert first.returncode == 1
    assert f"refused: rank 0 on {socket.gethostname()}: the first all-reduce failed" in first.stderr
    assert "the network interface to rank 0 is lo (127.0.0.1)" in first.stderr


def test_a_first_all_reduce_that_never_connects_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """As NCCL's, which waits for ranks that can't be reached before any timeout begins to count."""
    ended = threading.Event()

    def connect(*_: object, **__: object) -> None:
        ended.wait(60)
        raise RuntimeError("the test is over")

    monkeypatch.setattr(preflight, "CONNECT_SLACK_S", 0.1)
    monkeypatch.setattr(preflight.dist, "all_reduce", connect)
    started = time.monotonic()
    with pytest.raises(UserError, match=r"rank 0 on \S+: the first all-reduce failed: no answer in 1 s; the network"):
        preflight.check_all_reduce(0, 2, torch.device("cpu"), 1.0)
    assert time.monotonic() - started < 20
    ended.set()
    for thread in threading.enumerate():
        if thread.name == "first all-reduce":
            thread.join(20)


TIMEOUTS = """
import time, torch, torch.distributed as dist
from dist_finetune.spec import LaunchSpec
from dist_finetune.world import join_world
with join_world(LaunchSpec(join_timeout=2, timeout=60)) as world:
    if world.rank == 1:
        time.sleep(5)
    dist.all_reduce(torch.ones(1))
    print("reduced")
"""


@pytest.mark.dist
def test_the_short_time_to_join_does_not_count_for_training(tmp_path: Path) -> None:
    assert [done.stdout for done in ranks_of(TIMEOUTS, tmp_path)] == ["reduced\n"] * 2


HANG = """
import os, sys, time
from dist_finetune import doctor, doctor_ranks
doctor.COLLECTIVE_TIMEOUT_S = 4
if os.environ["RANK"] == "1":
    doctor_ranks.all_reduce_finding = lambda world: (time.sleep(15), os._exit(0))
sys.exit(doctor.examine(None, print))
"""


@pytest.mark.dist
def test_a_doctor_whose_collective_hangs_says_what_it_found(tmp_path: Path) -> None:
    first, _ = ranks_of(HANG, tmp_path, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    out = first.stdout
    assert first.returncode == 1
    assert "Traceback" not in first.stderr, first.stderr
    assert re.search(r"^ok    ranks +2 ranks by variables", out, re.MULTILINE), out
    assert re.search(r"^ok    rendezvous", out, re.MULTILINE), out
    assert re.search(
        r"^fail  ranks +rank 0 on \S+ could not go on after 'rendezvous': .*\n +-> a rank", out, re.MULTILINE
    )
    assert out.splitlines()[-1].startswith("1 to mend")
