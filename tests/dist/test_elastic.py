"""An elastic torchrun: a machine that goes, or comes, costs no more than the steps since the last checkpoint."""

import sys
from pathlib import Path

import pytest
from harness import free_port, read_json, read_lines
from job_process import JobProcess, faulty_config, last_step, started, wait_for, write_config
from material import Material

pytestmark = [pytest.mark.dist, pytest.mark.slow]  # the time-outs of torchrun's rendezvous add up to a minute or two

NUM_STEPS = 300


def agent(config: Path, port: int) -> list[str]:
    """One machine's torchrun, of one process; its rendezvous waits 15 s for another machine."""
    return [
        sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3",
        "--rdzv-backend=c10d", "--rdzv-id=elastic", f"--rdzv-endpoint=localhost:{port}",
        "--rdzv-conf=last_call_timeout=15", "-m", "dist_finetune", "train", str(config),
    ]  # fmt: skip


def test_machines_go_and_come(material: Material, tmp_path: Path) -> None:
    content = faulty_config(material, train={"epochs": NUM_STEPS // 10})
    config = write_config(tmp_path / "job.yaml", content, name="job", output=str(tmp_path / "runs"))
    run, command = tmp_path / "runs" / "job", agent(config, free_port())

    def wait_for_world(size: int, attempt: int, machine: JobProcess) -> None:
        """Until the run's `attempt` has so many processes, and has trained some steps."""

        def is_there() -> bool:
            starts = read_lines(run / "attempts.jsonl") if (run / "attempts.jsonl").exists() else []
            return len(starts) >= attempt and last_step(run) >= starts[-1]["step"] + 12

        wait_for(is_there, 180, lambda: machine.output()[-6000:])
        assert read_lines(run / "attempts.jsonl")[attempt - 1]["world_size"] == size

    folders = [tmp_path / name for name in ("first", "second", "third")]
    for folder in folders:
        folder.mkdir()
    with started(command, folders[0], material, SLOW_S="0.15") as first:
        with started(command, folders[1], material, SLOW_S="0.15"):
            wait_for_world(2, 1, first)
        wait_for_world(1, 2, first)
        with started(command, folders[2], material, SLOW_S="0.15") as third:
            wait_for_world(2, 3, first)
            assert first.wait(240) == 0, first.output()[-6000:]
            assert third.wait(60) == 0, third.output()[-6000:]
    summary = read_json(run / "summary.json")
    assert (summary["status"], summary["attempts"], summary["world_size"]) == ("finished", 3, 2)
    steps = [row["step"] for row in read_lines(run / "metrics.jsonl") if "train/loss" in row]
    assert steps == list(range(1, NUM_STEPS + 1)), "each step once"
