"""An elastic torchrun that loses a machine, or gets another, goes on with those that are there."""

import sys
from pathlib import Path

import pytest
from harness import free_port, read_json, read_lines
from job_process import faulty_config, last_step, started, wait_for, write_config
from material import Material

pytestmark = [pytest.mark.dist, pytest.mark.slow]  # the time-outs of torchrun's rendezvous add up to a minute

NUM_STEPS = 60


def agent(config: Path, port: int, is_host: bool) -> list[str]:
    """One machine's torchrun, of one process; its rendezvous waits 15 s for another machine. The host must stay."""
    return [
        sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3",
        "--rdzv-backend=c10d", "--rdzv-id=elastic", f"--rdzv-endpoint=localhost:{port}",
        f"--rdzv-conf=last_call_timeout=15,is_host={is_host}", "-m", "dist_finetune", "train", str(config),
    ]  # fmt: skip


def finished_with_each_step_once(run: Path) -> None:
    assert read_json(run / "summary.json")["status"] == "finished"
    steps = [row["step"] for row in read_lines(run / "metrics.jsonl") if "train/loss" in row]
    assert steps == list(range(1, NUM_STEPS + 1))


def test_a_machine_that_goes_costs_the_steps_since_the_last_checkpoint(material: Material, tmp_path: Path) -> None:
    content = faulty_config(material, train={"epochs": NUM_STEPS // 10})
    config = write_config(tmp_path / "job.yaml", content, name="job", output=str(tmp_path / "runs"))
    run, port = tmp_path / "runs" / "job", free_port()
    for name in ("stays", "goes"):
        (tmp_path / name).mkdir()
    with started(agent(config, port, is_host=True), tmp_path / "stays", material, SLOW_S="0.1") as stays:
        with started(agent(config, port, is_host=False), tmp_path / "goes", material, SLOW_S="0.1"):
            wait_for(lambda: last_step(run) >= 12, 180, lambda: stays.output()[-6000:])
        assert stays.wait(240) == 0, stays.output()[-6000:]
    starts = read_lines(run / "attempts.jsonl")
    assert [start["world_size"] for start in starts] == [2, 1]
    assert starts[1]["step"] >= 10, "a checkpoint every five steps"
    finished_with_each_step_once(run)


def test_a_machine_that_comes_later_costs_no_step(material: Material, tmp_path: Path) -> None:
    """torchrun ends its workers to start them anew together with the newcomer's: they save where they are.

    The variable is torch's own: with a store that is shared over rounds, an agent that stays does not tell a newcomer
    its address (torch 2.14), and both give up after a minute.
    """
    apart = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    content = faulty_config(material, train={"epochs": NUM_STEPS // 10}, checkpoint={"every": f"{NUM_STEPS} steps"})
    config = write_config(tmp_path / "job.yaml", content, name="job", output=str(tmp_path / "runs"))
    run, port = tmp_path / "runs" / "job", free_port()
    for name in ("first", "comes"):
        (tmp_path / name).mkdir()
    with started(agent(config, port, is_host=True), tmp_path / "first", material, SLOW_S="0.3", **apart) as first:
        wait_for(lambda: last_step(run) >= 5, 180, lambda: first.output()[-6000:])
        with started(agent(config, port, is_host=False), tmp_path / "comes", material, SLOW_S="0.1", **apart) as comes:
            assert first.wait(300) == 0, first.output()[-6000:]
            assert comes.wait(60) == 0, comes.output()[-6000:]
    starts = read_lines(run / "attempts.jsonl")
    assert [start["world_size"] for start in starts] == [1, 2]
    assert starts[1]["step"] >= 5, "nothing but this stop saved before the end"
    finished_with_each_step_once(run)
