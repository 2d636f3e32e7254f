"""A machine is taken away in mid-run and another one goes on: all that is left is what the storage holds."""

import contextlib
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from harness import Run, clean_environment, finish, read_lines, torchrun, write_config
from material import Material

pytestmark = pytest.mark.dist

KEEP = (
    "import sys; from pathlib import Path; from dist_finetune.storage import keep\n"
    "sys.exit(keep(sys.argv[1], Path(sys.argv[2]), sys.argv[3:], push_every_s=0.2))"
)


def test_a_run_goes_on_from_its_storage_on_another_machine(material: Material, tmp_path: Path) -> None:
    bucket, runs = tmp_path / "bucket", tmp_path / "runs"
    content = material.text(
        shard={"strategy": "zero2"}, train={"epochs": 12}, checkpoint={"every": "10 steps"}, cache="off"
    )
    config = write_config(tmp_path / "taken.yaml", content, output=str(runs))
    worker = [*torchrun(2), "-m", "dist_finetune", "train", str(config)]
    command = [sys.executable, "-c", KEEP, f"file://{bucket}", str(runs / "taken"), *worker]
    first = subprocess.Popen(command, cwd=tmp_path, env=clean_environment(), stdout=-3, stderr=-3)
    try:
        deadline = time.monotonic() + 120
        while not list(bucket.glob("checkpoints/step-*/COMPLETE")):
            assert first.poll() is None, "it ended before it was taken away"
            assert time.monotonic() < deadline, "no checkpoint reached the storage"
            time.sleep(0.05)
    finally:
        for process in [*psutil.Process(first.pid).children(recursive=True), first]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        first.wait()
    shutil.rmtree(runs)
    saved = max(int(path.parent.name.removeprefix("step-")) for path in bucket.glob("checkpoints/step-*/COMPLETE"))

    done = finish(command, 240, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    run = Run(runs / "taken", ())
    assert run.summary["status"] == "finished"
    attempts = read_lines(bucket / "attempts.jsonl")
    assert [attempt["step"] for attempt in attempts] == [0, saved]
    assert len(run.series("train/loss")) == run.summary["steps"] == 120
    assert Run(bucket, ()).summary == run.summary, "the storage holds the end as well"
    assert sorted(Run(bucket, ()).weights()) == sorted(run.weights())
