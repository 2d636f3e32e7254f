"""Local launcher (real processes), the world as every launcher describes it, and settings that launchers bring."""

import base64
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dist_finetune.errors import UserError
from dist_finetune.launchers import local
from dist_finetune.launchers.brought import brought_settings, refuse_contradictions
from dist_finetune.launchers.environment import (
    LaunchedAs,
    first_host,
    refuse_run_in_many,
    scrubbed,
    torch_variables,
    world_from_environment,
)
from dist_finetune.launchers.local import count_gpus, launch_local, num_workers
from dist_finetune.spec import Spec
from dist_finetune.spec_file import load_spec

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "n1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "7",
}
DEEPSPEED = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "CROSS_RANK": "0",
    "CROSS_SIZE": "1",
    "LOCAL_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}
SRUN = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_NTASKS": "6",
    "SLURM_STEP_TASKS_PER_NODE": "4,2",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}
MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "MASTER_ADDR": "n1",
    "MASTER_PORT": "29511",
}


def without(env: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in env.items() if name not in names}


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, LaunchedAs("none")),
        (TORCHRUN, LaunchedAs("torchrun", 3, 1, 4, 2, 1, "n1", 29500)),
        ({**TORCHRUN, "ACCELERATE_MIXED_PRECISION": "no"}, LaunchedAs("accelerate launch", 3, 1, 4, 2, 1, "n1", 29500)),
        (DEEPSPEED, LaunchedAs("deepspeed", 1, 1, 2, 2, 0, "127.0.0.1", 29500)),
        # The caller of deepspeed was itself a worker of torchrun.
        ({**DEEPSPEED, "LOCAL_WORLD_SIZE": "1"}, LaunchedAs("deepspeed", 1, 1, 2, 2, 0, "127.0.0.1", 29500)),
        (
            without(DEEPSPEED, "CROSS_RANK", "CROSS_SIZE", "LOCAL_SIZE"),
            LaunchedAs("variables", 1, 1, 2, 2, 0, "127.0.0.1", 29500),
        ),
        (SRUN, LaunchedAs("srun", 5, 1, 6, 2, 1, "gpu07", 10_000 + 47110 % 20_000)),
        (MPIRUN, LaunchedAs("mpirun", 2, 0, 4, 2, 1, "n1", 29511)),
        # One torchrun for each of two srun tasks.
        (
            {**SRUN, **TORCHRUN, "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"},
            LaunchedAs("torchrun", 3, 1, 4, 2, 1, "n1", 29500),
        ),
        # A job script, or an interactive step, that starts torchrun itself.
        (
            {**TORCHRUN, "SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"},
            LaunchedAs("torchrun", 3, 1, 4, 2, 1, "n1", 29500),
        ),
        (
            {
                "SLURM_JOB_ID": "1",
                "SLURM_STEP_ID": "0",
                "SLURM_PROCID": "0",
                "SLURM_STEP_NUM_TASKS": "1",
                "SLURM_NTASKS": "8",
            },
            LaunchedAs("none"),
        ),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, LaunchedAs("variables")),
        # An elastic torchrun in each of 4 tasks, of which 2 machines are left.
        (
            {**SRUN, **TORCHRUN, "GROUP_WORLD_SIZE": "2", "SLURM_STEP_NUM_TASKS": "4"},
            LaunchedAs("torchrun", 3, 1, 4, 2, 1, "n1", 29500),
        ),
    ],
)
def test_world_of_each_launcher(env: dict[str, str], expected: LaunchedAs) -> None:
    assert world_from_environment(env) == expected


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({**TORCHRUN, "RANK": "4"}, "rank 4 does not exist in a world of 4"),
        ({**TORCHRUN, "LOCAL_RANK": "2"}, "local rank 2 does not exist among 2"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "8"}, "8 processes on this machine are more than all 4"),
        ({**TORCHRUN, "WORLD_SIZE": "four"}, "WORLD_SIZE='four' in the environment is no whole number"),
        ({"WORLD_SIZE": "2"}, "has WORLD_SIZE=2, but not RANK and LOCAL_RANK"),
        (without(TORCHRUN, "MASTER_PORT"), "MASTER_PORT is missing"),
        (without(TORCHRUN, "LOCAL_WORLD_SIZE"), "LOCAL_WORLD_SIZE is missing"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE is 2, but OMPI_COMM_WORLD_RANK"),
        (without(MPIRUN, "MASTER_ADDR", "MASTER_PORT"), "no address to meet at"),
        (
            {**SRUN, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"},
            "srun started 6 tasks, but in this one WORLD_SIZE is 1",
        ),
        ({**MPIRUN, **DEEPSPEED}, "mpirun started 4 tasks, but in this one WORLD_SIZE is 2"),
        # Each node's torchrun on its own (--standalone): 2 tasks, 2 worlds of 2.
        (
            {**SRUN, **TORCHRUN, "RANK": "1", "WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "1", "SLURM_STEP_NUM_TASKS": "2"},
            "separate trainings side by side",
        ),
        (
            {**without(TORCHRUN, "TORCHELASTIC_RUN_ID"), **SRUN, "WORLD_SIZE": "6", "RANK": "0"},
            "RANK is 0, but this is task 5",
        ),
        ({"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, "starts this worker once"),
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"}, "accelerate launch was asked for several"),
    ],
)
def test_worlds_that_disagree_are_refused(env: dict[str, str], words: str) -> None:
    with pytest.raises(UserError) as refused:
        world_from_environment(env)
    assert words in str(refused.value)


@pytest.mark.parametrize(("of_accelerate", "is_one"), [("False", True), ("True", False)])
def test_an_address_that_the_site_exports_asks_for_no_more_processes(of_accelerate: str, is_one: bool) -> None:
    """A shell stands for `accelerate launch` of one process: both were started with the site's MASTER_ADDR."""
    show = "import os; from dist_finetune.launchers.environment import *; print(world_from_environment(os.environ))"
    sites = {"MASTER_ADDR": "login1", "MASTER_PORT": "29500", "PYTHONPATH": str(Path(__file__).parents[2])}
    launched = (
        f"export ACCELERATE_MIXED_PRECISION=no ACCELERATE_USE_CPU={of_accelerate}; {sys.executable} -c '{show}'; :"
    )
    done = subprocess.run(["sh", "-c", launched], capture_output=True, text=True, timeout=60, check=False, env=sites)
    assert ("launcher='none'" in done.stdout) == is_one, done.stderr
    assert ("accelerate launch was asked for several CPU processes" in done.stderr) != is_one


def test_all_ranks_of_an_srun_step_describe_one_world() -> None:
    places = ((0, 0, 0), (1, 0, 1), (2, 0, 2), (3, 0, 3), (4, 1, 0), (5, 1, 1))
    found = [
        world_from_environment({**SRUN, "SLURM_PROCID": str(p), "SLURM_NODEID": str(n), "SLURM_LOCALID": str(local)})
        for p, n, local in places
    ]
    assert [(w.rank, w.node_rank, w.local_rank) for w in found] == list(places)
    assert [w.local_world_size for w in found] == [4, 4, 4, 4, 2, 2]
    assert len({(w.master_addr, w.master_port, w.world_size) for w in found}) == 1


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [("n1", "n1"), ("n1,n2", "n1"), ("gpu[003-010,12],x", "gpu003"), ("a[7]-ib,b", "a7-ib"), ("r1-n[1,3]", "r1-n1")],
)
def test_first_host_of_a_node_list(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


def test_torch_variables_say_where_ranks_meet() -> None:
    assert torch_variables(world_from_environment(SRUN))["MASTER_ADDR"] == "gpu07"
    assert "MASTER_ADDR" not in torch_variables(LaunchedAs("none"))
    with pytest.raises(UserError, match="MASTER_ADDR or MASTER_PORT is missing"):
        torch_variables(LaunchedAs("srun", 0, 0, 2, 2, 0, None, 1))


@pytest.mark.parametrize(("env", "times"), [(SRUN, 6), (MPIRUN, 4), (TORCHRUN, 4)])
def test_run_refuses_to_be_started_many_times(env: dict[str, str], times: int) -> None:
    with pytest.raises(UserError, match=f"started this command {times} times"):
        refuse_run_in_many(env)
    refuse_run_in_many({"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"})


# --- settings that a launcher brings ---------------------------------------------------------------------------------

LAUNCH_DEFAULTS = {
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_DYNAMO_BACKEND": "NO",
    "ACCELERATE_USE_CPU": "False",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": "none",
    "OMP_NUM_THREADS": "1",
}
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_OFFLOAD_PARAMS": "false", "FSDP_ACTIVATION_CHECKPOINTING": "false"}
CHECKPOINTING = {"gradient_checkpointing": True}


def small_spec(**train: Any) -> Spec:
    return load_spec({"name": "x", "model": {"name": "m"}, "data": {"train": "d"}, "train": train})


def test_launcher_defaults_bring_nothing() -> None:
    assert brought_settings(LAUNCH_DEFAULTS) == {}
    assert refuse_contradictions({}, small_spec(), "ddp", "fp32") == []


@pytest.mark.parametrize(
    ("brought", "words"),
    [
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "but the run uses zero2: write shard.strategy: zero3"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "the run trains in fp32: write train.precision: bf16"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "train.precision: fp16"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "8"}, "train.global_batch_size (32)"),
        ({"ACCELERATE_GRADIENT_CLIPPING": "0.5"}, "but train.max_grad_norm is 1.0"),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP is asked for, but the run uses zero2"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "train.compile alone says whether the run compiles"),
        ({"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, "optimizer moments on the device"),
        ({"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "nvme"}, "parameters on the device"),
    ],
)
def test_contradicting_settings_are_named(brought: dict[str, str], words: str) -> None:
    env = {**LAUNCH_DEFAULTS, **brought}
    with pytest.raises(UserError) as refused:
        refuse_contradictions(brought_settings(env), small_spec(), "zero2", "fp32")
    assert words in str(refused.value)
    assert str(refused.value).count("\n  ") == 1, "one problem, and no other"


@pytest.mark.parametrize(
    ("brought", "sections", "strategy", "precision"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, {}, "fsdp", "fp32"),
        ({**FSDP, "FSDP_OFFLOAD_PARAMS": "true"}, {"shard": {"offload": "parameters"}}, "fsdp", "fp32"),
        (
            {**FSDP, "FSDP_ACTIVATION_CHECKPOINTING": "true"},
            {"train": {"gradient_checkpointing": True}},
            "fsdp",
            "fp32",
        ),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, {}, "ddp", "fp16"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, {"train": {"compile": True}}, "ddp", "fp32"),
        (
            {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"},
            {"shard": {"offload": "optimizer"}},
            "zero2",
            "fp32",
        ),
    ],
)
def test_settings_that_the_config_has_too(
    brought: dict[str, str], sections: dict[str, Any], strategy: str, precision: str
) -> None:
    spec = load_spec({"name": "x", "model": {"name": "m"}, "data": {"train": "d"}, **sections})
    assert refuse_contradictions(brought_settings(brought), spec, strategy, precision) == []


def test_what_accelerates_fsdp_would_do_beside_sharding_is_compared() -> None:
    asked = {**FSDP, "FSDP_OFFLOAD_PARAMS": "true", "FSDP_ACTIVATION_CHECKPOINTING": "true"}
    with pytest.raises(UserError) as refused:
        refuse_contradictions(brought_settings(asked), small_spec(), "fsdp", "fp32")
    assert "parameters on the device: write shard.offload" in str(refused.value)
    assert "write train.gradient_checkpointing: true" in str(refused.value)
    assert str(refused.value).count("\n  ") == 2


def test_agreeing_settings_pass_and_all_contradictions_come_at_once() -> None:
    agreeing = {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
        "ACCELERATE_MIXED_PRECISION": "bf16",
        "ACCELERATE_GRADIENT_CLIPPING": "1.0",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
    }
    brought = brought_settings(agreeing)
    assert len(brought) == 5
    assert refuse_contradictions(brought, small_spec(), "zero2", "bf16", gradient_accumulation_steps=4) == []
    with pytest.raises(UserError) as refused:
        refuse_contradictions(brought, small_spec(max_grad_norm=None), "ddp", "fp32", gradient_accumulation_steps=2)
    assert str(refused.value).count("\n  ") == 4


def test_deepspeed_without_a_stage_contradicts_only_ddp() -> None:
    brought = brought_settings({"ACCELERATE_USE_DEEPSPEED": "true"})
    assert refuse_contradictions(brought, small_spec(), "zero1", "fp32") == []
    with pytest.raises(UserError, match="use_deepspeed"):
        refuse_contradictions(brought, small_spec(), "ddp", "fp32")


def test_cpu_is_refused_only_where_a_gpu_would_be_used() -> None:
    brought = brought_settings({"ACCELERATE_USE_CPU": "True"})
    assert refuse_contradictions(brought, small_spec(), "ddp", "fp32", device="cpu") == []
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES"):
        refuse_contradictions(brought, small_spec(), "ddp", "fp32", device="cuda")


@pytest.mark.parametrize("as_text", [False, True])
def test_a_deepspeed_file_is_compared_key_by_key(tmp_path: Path, as_text: bool) -> None:
    content = {
        "train_batch_size": 64,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 3, "overlap_comm": True, "offload_optimizer": {"device": "cpu"}},
        "bf16": {"enabled": True},
        "fp16": {"enabled": False},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": 0.1}},
    }
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(content))
    location = base64.urlsafe_b64encode(path.read_bytes()).decode() if as_text else str(path)
    brought = brought_settings({"ACCELERATE_DEEPSPEED_CONFIG_FILE": location})
    with pytest.raises(UserError) as refused:
        refuse_contradictions(brought, small_spec(), "zero2", "fp32")
    message = str(refused.value)
    named = ("train_batch_size", "zero_optimization.stage", "offload_optimizer.device", "bf16.enabled", "weight_decay")
    assert [key for key in named if f"{key} is" in message] == list(named)
    assert message.count("\n  ") == len(named)

    content |= {"train_batch_size": 32, "zero_optimization": {"stage": 2, "overlap_comm": True}, "optimizer": {}}
    content["bf16"] = {"enabled": False}
    path.write_text(json.dumps(content))
    if not as_text:
        notes = refuse_contradictions(brought, small_spec(), "zero2", "fp32")
        assert len(notes) == 1
        assert "zero_optimization.overlap_comm has no effect" in notes[0]


def test_an_unreadable_deepspeed_file_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no readable JSON"):
        refuse_contradictions({"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(tmp_path / "x")}, small_spec(), "zero2", "fp32")


def test_scrubbed_names_what_accelerate_would_read() -> None:
    env = {**LAUNCH_DEFAULTS, "FSDP_VERSION": "1", "ACCELERATE_LOG_LEVEL": "info", "RANK": "0"}
    assert sorted(scrubbed(env)) == sorted([*without(LAUNCH_DEFAULTS, "OMP_NUM_THREADS"), "FSDP_VERSION"])


# --- local launcher --------------------------------------------------------------------------------------------------


LISTEN = "signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1))\n"


def python(code: str, start: str = LISTEN) -> list[str]:
    """A worker that listens to signals at once, as a program does that no launcher of ours has started."""
    imports = "import os, pathlib, signal, sys, time\nrank = int(os.environ['RANK'])\n"
    return [sys.executable, "-S", "-c", f"{imports}{start}{code}"]


def test_workers_get_the_variables_of_their_rank(tmp_path: Path) -> None:
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "DIST_FINETUNE_LAUNCHER"]
    code = launch_local(
        python(f"print(*(os.environ[n] for n in {names}), os.environ['MASTER_PORT'])"), 3, tmp_path / "logs"
    )
    lines = [(tmp_path / "logs" / f"rank-{rank}.txt").read_text().split() for rank in range(3)]
    assert code == 0
    assert [line[:-1] for line in lines] == [[str(r), str(r), "3", "3", "127.0.0.1", "run"] for r in range(3)]
    assert len({line[-1] for line in lines}) == 1


@pytest.mark.parametrize(("code", "expected"), [("0", 0), ("1", 1), ("2", 2), ("75", 75)])
def test_the_exit_code_is_the_workers(tmp_path: Path, code: str, expected: int) -> None:
    assert launch_local(python(f"sys.exit({code})"), 2, tmp_path) == expected


def test_stopping_ranks_wait_for_each_other_and_a_failure_beats_them(tmp_path: Path) -> None:
    slow = "time.sleep(0.8 * rank); open(os.environ['MARK'], 'w').close() if rank else None; sys.exit(75)"
    mark = tmp_path / "saved"
    assert launch_local(python(slow), 2, tmp_path, env={**os.environ, "MARK": str(mark)}) == 75
    assert mark.exists(), "rank 1 was stopped before it had saved"
    assert launch_local(python("sys.exit(1 if rank else 75)"), 2, tmp_path) == 1


def test_one_failing_rank_stops_the_others_and_has_the_last_word(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code = """
if rank == 1:
    print('error: rank 1 says why\\n  and more', file=sys.stderr)
    sys.exit(2)
print('hi', flush=True)
time.sleep(60)
"""
    started = time.monotonic()
    assert launch_local(python(code), 3, tmp_path) == 2
    assert time.monotonic() - started < 5
    shown = capfd.readouterr()
    assert shown.out == "hi\n"
    assert shown.err == "error: rank 1 says why\n  and more\n"


def test_the_same_message_of_all_ranks_is_shown_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert launch_local(python("print('error: no such column', file=sys.stderr); sys.exit(2)"), 2, tmp_path) == 2
    assert capfd.readouterr().err == "error: no such column\n"


def test_warnings_of_other_ranks_are_shown_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What all ranks warn of comes from rank 0 alone, whoever is first; what is said to nobody stays in the log."""
    code = """
import warnings
if rank: time.sleep(0.1)
print('nothing special of', rank)
if rank == 0: time.sleep(0.5)
print(f'[2026-01-0{rank + 1} 10:00:00] [WARNING] an old driver', file=sys.stderr, flush=True)
for _ in range(3 if rank else 0): print(f'n1:{os.getpid()} NCCL WARN rank {rank} is slow', file=sys.stderr, flush=True)
if rank == 2: warnings.warn('the disk is nearly full')
time.sleep(1.5)
if rank == 1: print('a late warning: hot', flush=True)
"""
    assert launch_local(python(code), 3, tmp_path) == 0
    shown = capfd.readouterr()
    assert shown.out == "nothing special of 0\n"
    lines = shown.err.splitlines()
    assert sum("an old driver" in line for line in lines) == 1
    assert sum("is slow" in line for line in lines) == 1
    assert any(re.fullmatch(r"rank [12]: n1:\d+ NCCL WARN rank [12] is slow", line) for line in lines)
    assert any(line.startswith("rank 2: ") and "UserWarning: the disk is nearly full" in line for line in lines)
    assert lines[-1] == "rank 1: a late warning: hot"
    assert "an old driver" in (tmp_path / "rank-1.txt").read_text()


def test_a_wrong_input_is_preferred_to_what_it_causes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = f"""
here = pathlib.Path({str(tmp_path / "here")!r})
if rank == 0:
    while not here.exists(): time.sleep(0.01)
    print('Traceback: connection closed', file=sys.stderr)
    sys.exit(1)
here.touch()
time.sleep(0.2)
print('error: bad file', file=sys.stderr)
sys.exit(2)
"""
    assert launch_local(python(code), 2, tmp_path) == 2
    assert capfd.readouterr().err.endswith("error: bad file\n")


def test_a_killed_rank_is_named_with_its_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = "print('at work', flush=True)\nif rank == 1: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)"
    assert launch_local(python(code), 2, tmp_path) == 137
    err = capfd.readouterr().err
    assert "error: rank 1 of 2 was ended by SIGKILL, as the system does when memory runs out" in err
    assert str(tmp_path / "rank-1.txt") in err


def test_a_rank_that_ignores_sigterm_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dist_finetune.launchers.local.FAILURE_GRACE_S", 0.3)
    code = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nif rank: time.sleep(0.3); sys.exit(1)\ntime.sleep(60)"
    started = time.monotonic()
    assert launch_local(python(code), 2, tmp_path) == 1
    assert time.monotonic() - started < 5


def test_output_waits_for_the_run_folder_and_is_added_to_what_is_there(tmp_path: Path) -> None:
    run = tmp_path / "run"
    code = """
print('early', flush=True)
if rank == 0:
    time.sleep(0.3)
    os.mkdir(os.environ['RUN'])
time.sleep(0.6)
print('late')
"""
    assert launch_local(python(code), 2, run / "logs", run.exists, {**os.environ, "RUN": str(run)}) == 0
    assert [(run / "logs" / f"rank-{r}.txt").read_text() for r in (0, 1)] == ["early\nlate\n"] * 2
    assert launch_local(python("print('again')"), 1, run / "logs", run.exists) == 0
    assert (run / "logs" / "rank-0.txt").read_text() == "early\nlate\nagain\n"


def test_nothing_is_made_where_the_run_folder_never_came(tmp_path: Path) -> None:
    assert launch_local(python("sys.exit(2)"), 2, tmp_path / "run" / "logs", (tmp_path / "run").exists) == 2
    assert list(tmp_path.iterdir()) == []


LAUNCHER = """
import sys
from pathlib import Path
from dist_finetune.launchers.local import launch_local
sys.exit(launch_local([sys.executable, "-S", "-c", sys.argv[1]], 2, Path(sys.argv[2])))
"""


def start_launcher(worker: str, folder: Path, start: str = LISTEN, **streams: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", LAUNCHER, python(worker, start)[-1], str(folder)], **streams)


def wait_for(condition: Any, what: str, timeout_s: float = 10) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for: {what}"
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_reach_all_workers_and_their_exit_code_comes_back(tmp_path: Path, number: signal.Signals) -> None:
    worker = (
        f"signal.signal({int(number)}, lambda *a: sys.exit(75))\n"
        f"open(os.path.join({str(tmp_path)!r}, f'ready-{{rank}}'), 'w').close()\ntime.sleep(60)"
    )
    launcher = start_launcher(worker, tmp_path / "logs")
    wait_for(lambda: len(list(tmp_path.glob("ready-*"))) == 2, "both workers")
    launcher.send_signal(number)
    assert launcher.wait(timeout=10) == 75


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_waits_for_a_worker_that_is_still_starting(tmp_path: Path, number: signal.Signals) -> None:
    worker = (
        f"open(os.path.join({str(tmp_path)!r}, f'ready-{{rank}}'), 'w').close()\ntime.sleep(0.5)\n"
        f"signal.signal({int(number)}, lambda *a: sys.exit(75))\n{LISTEN}time.sleep(60)"
    )
    launcher = start_launcher(worker, tmp_path / "logs", start="")
    wait_for(lambda: len(list(tmp_path.glob("ready-*"))) == 2, "both workers")
    launcher.send_signal(number)
    assert launcher.wait(timeout=10) == 75


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux can tie a child's life to its parent's")
def test_a_signal_that_comes_before_the_first_worker_reaches_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, signals = local._start, [signal.SIGUSR1]

    def signal_then_start(*given: Any) -> Any:
        if signals:
            os.kill(os.getpid(), signals.pop())
        return start(*given)

    monkeypatch.setattr(local, "_start", signal_then_start)
    worker = python("signal.signal(signal.SIGUSR1, lambda *a: sys.exit(75))\n" + LISTEN + "time.sleep(5)", "")
    assert launch_local(worker, 2, tmp_path / "logs") == 75


def test_workers_of_a_run_in_torchrun_hold_their_own_store(tmp_path: Path) -> None:
    env = {**os.environ, "TORCHELASTIC_USE_AGENT_STORE": "True"}
    worker = python("sys.exit('TORCHELASTIC_USE_AGENT_STORE' in os.environ)")
    assert launch_local(worker, 1, tmp_path / "logs", env=env) == 0


def test_no_orphan_is_left_when_the_launcher_is_killed(tmp_path: Path) -> None:
    worker = (
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"path = os.path.join({str(tmp_path)!r}, f'pid-{{rank}}')\n"
        "open(path + '~', 'w').write(str(os.getpid())); os.rename(path + '~', path)\ntime.sleep(60)"
    )
    launcher = start_launcher(worker, tmp_path / "logs")
    wait_for(lambda: len(list(tmp_path.glob("pid-?"))) == 2, "both workers")
    pids = [int(path.read_text()) for path in tmp_path.glob("pid-?")]
    assert all(map(is_running, pids))
    launcher.kill()
    launcher.wait(timeout=10)
    wait_for(lambda: not any(map(is_running, pids)), "the workers' end")


def test_rank_0_has_a_terminal_where_we_have_one(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    worker = "print('tty' if sys.stdout.isatty() else 'pipe', sys.stderr.isatty())"
    launcher = start_launcher(worker, tmp_path, stdout=theirs, stderr=subprocess.DEVNULL)
    os.close(theirs)
    assert launcher.wait(timeout=10) == 0
    assert os.read(ours, 1000) == b"tty False\r\n"
    os.close(ours)
    assert [(tmp_path / f"rank-{r}.txt").read_text() for r in (0, 1)] == ["tty False\n", "pipe False\n"]


# --- how many processes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpus", "processes", "available", "expected"),
    [(None, None, 0, 1), (None, 2, 0, 2), (None, None, 8, 8), (3, None, 8, 3), (None, 4, 8, 4), (2, 2, 2, 2)],
)
def test_number_of_workers(gpus: int | None, processes: int | None, available: int, expected: int) -> None:
    assert num_workers(gpus, processes, available) == expected


@pytest.mark.parametrize(
    ("gpus", "processes", "available", "words"),
    [
        (4, None, 2, "--gpus 4 is more than the 2 visible GPUs"),
        (None, 4, 2, "--processes 4 is more than the 2 visible GPUs"),
        (2, None, 0, "no GPU is visible here. Use --processes 2"),
        (0, None, 2, "--gpus 0: at least one"),
        (None, -1, 0, "--processes -1: at least one"),
        (2, 3, 8, "disagree"),
    ],
)
def test_numbers_that_cannot_be(gpus: int | None, processes: int | None, available: int, words: str) -> None:
    with pytest.raises(UserError) as refused:
        num_workers(gpus, processes, available)
    assert words in str(refused.value)


def test_visible_gpus_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the nvidia-smi program, as this machine may have no GPU."""
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\nfor i in 0 1 2 3; do echo "GPU $i: Some Card (UUID: GPU-$i)"; done\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert count_gpus({}) == 4
    assert count_gpus({"CUDA_VISIBLE_DEVICES": "1,3"}) == 2
    assert count_gpus({"CUDA_VISIBLE_DEVICES": ""}) == 0
    assert count_gpus({"CUDA_VISIBLE_DEVICES": "-1"}) == 0
    assert count_gpus({"CUDA_VISIBLE_DEVICES": "0,-1,1"}) == 1
    assert count_gpus({"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5"}) == 4
    assert count_gpus({"CUDA_VISIBLE_DEVICES": "3,4"}) == 1
    assert count_gpus({"CUDA_VISIBLE_DEVICES": "4,5"}) == 0, "which torch can't see either"
    assert count_gpus({"CUDA_VISIBLE_DEVICES": "GPU-3,MIG-7"}) == 2


# --- the table in the README ---

LAUNCH_TABLE = {
    "this machine": ("tests/dist/test_launchers_agree.py", '"run": [sys.executable'),
    "Accelerate": ("tests/dist/test_launchers_agree.py", '"accelerate": [*ACCELERATE'),
    "torchrun": ("tests/dist/test_launchers_agree.py", "by_torchrun"),
    "elastic torchrun, on each machine": (
        "tests/dist/test_launch_table.py",
        "def test_elastic_torchrun_with_as_many_machines_as_come",
    ),
    "DeepSpeed": (
        "tests/dist/test_launchers_agree.py",
        '"deepspeed": [*DEEPSPEED, "--module", "dist_finetune", "train"',
    ),
    "SLURM, a task per node": ("tests/slurm/test_cluster.py", "def test_two_nodes_train_as_one_machine_does"),
    "SLURM, a task per GPU": ("tests/slurm/test_cluster.py", "def test_srun_starts_the_worker_itself"),
    "mpirun": ("tests/dist/test_launch_table.py", "def test_mpirun("),
}


def test_each_row_of_the_launch_table_has_a_test_that_runs_it() -> None:
    repository = Path(__file__).parents[2]
    table = (repository / "README.md").read_text(encoding="utf-8").split("## Under any launcher")[1].split("\n\n")[2]
    rows = [line.split("|")[1].strip() for line in table.splitlines()[2:]]
    assert rows == list(LAUNCH_TABLE)
    for file, words in LAUNCH_TABLE.values():
        assert words in (repository / file).read_text(encoding="utf-8")


# --- launchers of others, as installed -------------------------------------------------------------------------------

SHOW = """
import dataclasses, json, os, sys
from dist_finetune.launchers.brought import brought_settings
from dist_finetune.launchers.environment import world_from_environment
place = dataclasses.asdict(world_from_environment(os.environ))
line = json.dumps([place, brought_settings(os.environ)]) + "\\n"
os.write(1, line.encode())
"""
ACCELERATE_CONFIGS = Path(__file__).parents[2] / "launch" / "accelerate"
CPU_CONFIG = ACCELERATE_CONFIGS / "cpu_2.yaml"


def test_accelerate_reads_the_config_files() -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    found = {path.name: load_config_from_file(str(path)) for path in ACCELERATE_CONFIGS.glob("*.yaml")}
    sizes = {name: (config.num_machines, config.num_processes) for name, config in found.items()}
    assert sizes == {"cpu_2.yaml": (1, 2), "one_node_8gpu.yaml": (1, 8), "two_nodes.yaml": (2, 16)}
    assert {config.mixed_precision for config in found.values()} == {"no"}, "precision is the config's"


@pytest.mark.dist
@pytest.mark.parametrize(
    ("launch", "launcher", "brings"),
    [
        (["torchrun", "--nproc-per-node", "2", "--master-port", "0"], "torchrun", {}),
        pytest.param(
            ["accelerate", "launch", "--config_file", str(CPU_CONFIG)], "accelerate launch", {}, marks=pytest.mark.slow
        ),
        (
            [
                *("accelerate", "launch", "--num_processes", "2", "--main_process_port", "0"),
                *("--use_deepspeed", "--zero_stage", "3", "--mixed_precision", "bf16"),
            ],
            "accelerate launch",
            {
                "ACCELERATE_USE_DEEPSPEED": "true",
                "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
                "ACCELERATE_MIXED_PRECISION": "bf16",
            },
        ),
        (["deepspeed", "--num_accelerators", "2", "--master_port", "29563"], "deepspeed", {}),
    ],
    ids=["torchrun", "accelerate", "accelerate-deepspeed", "deepspeed"],
)
def test_real_launchers_are_recognised(
    tmp_path: Path, launch: list[str], launcher: str, brings: dict[str, str]
) -> None:
    script = tmp_path / "show.py"
    script.write_text(SHOW)
    program = str(Path(sys.executable).parent / launch[0])
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        [program, *launch[1:], str(script)], capture_output=True, text=True, timeout=120, check=False, env=env
    )
    shown = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[{")]
    assert done.returncode == 0, done.stderr
    assert sorted(place["rank"] for place, _ in shown) == [0, 1]
    for place, brought in shown:
        assert (place["launcher"], place["world_size"], place["local_world_size"]) == (launcher, 2, 2)
        assert place["local_rank"] == place["rank"]
        assert brought == brings
