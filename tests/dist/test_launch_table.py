"""The other rows of the launch table: mpirun, elastic torchrun, and a torchrun on each of two machines.

`test_launchers_agree.py` has those that start on one machine, `tests/slurm` those of srun.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from harness import Run, clean_environment, finish, free_port, ten_steps
from job_process import mpirun_command, needs_mpirun
from material import Material

pytestmark = pytest.mark.dist
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
WORKER = ["-m", "dist_finetune", "train"]


def assert_same(run: Run, reference: Run) -> None:
    assert (run.summary["status"], run.summary["world_size"]) == ("finished", 2)
    for key in ("train/loss", "train/lr", "eval/loss", "progress/samples"):
        assert len(run.series(key)) == len(reference.series(key)) > 0
        assert run.series(key) == reference.series(key), key
    ours, theirs = run.weights(), reference.weights()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@needs_mpirun
def test_mpirun(material: Material, by_torchrun: Run, tmp_path: Path) -> None:
    done = finish(mpirun_command(ten_steps(material, tmp_path, "mpirun")), 200, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(Run(tmp_path / "runs" / "mpirun", ()), by_torchrun)


@needs_mpirun
def test_mpirun_without_a_meeting_point_is_told_how(material: Material, tmp_path: Path) -> None:
    done = finish(mpirun_command(ten_steps(material, tmp_path, "lost"), meeting=False), 120, tmp_path)
    assert done.returncode != 0
    assert "mpirun -x MASTER_ADDR=" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_elastic_torchrun_with_as_many_machines_as_come(material: Material, by_torchrun: Run, tmp_path: Path) -> None:
    path = ten_steps(material, tmp_path, "elastic")
    elastic = ["--nnodes=1:4", "--nproc-per-node=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{free_port()}"]
    # An elastic start waits a while for more machines; here none will come.
    command = [*TORCHRUN, *elastic, "--rdzv-conf=last_call_timeout=1", *WORKER, str(path)]
    done = finish(command, 200, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(Run(tmp_path / "runs" / "elastic", ()), by_torchrun)


@pytest.mark.slow  # every SLURM job of two nodes starts so too
def test_a_torchrun_on_each_of_two_machines(material: Material, by_torchrun: Run, tmp_path: Path) -> None:
    path = ten_steps(material, tmp_path, "two")
    port = free_port()
    nodes = [
        subprocess.Popen(
            [
                *TORCHRUN, "--nnodes=2", "--nproc-per-node=1", f"--node-rank={rank}", "--master-addr=127.0.0.1",
                f"--master-port={port}", *WORKER, str(path),
            ],
            cwd=tmp_path, env=clean_environment(), text=True, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        errors = [node.communicate(timeout=200)[1] for node in nodes]
    finally:
        for node in nodes:
            if node.poll() is None:
                os.killpg(node.pid, signal.SIGKILL)
            node.communicate()
    assert [node.returncode for node in nodes] == [0, 0], errors[0][-3000:]
    assert_same(Run(tmp_path / "runs" / "two", ()), by_torchrun)
