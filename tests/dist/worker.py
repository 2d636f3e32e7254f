"""Several runs in one process group, so that a test module pays the start-up once: worker.py JOBS.json RESULTS.json

JOBS.json is a list of {"name", "config", "overrides", "by_rank"}; `by_rank` holds more overrides for some ranks, for
tests of ranks that disagree. Each rank writes RESULTS.json.RANK: for each job its summary, or the error it ended with.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import no_page  # noqa: F401
import torch
import torch.distributed as dist

from dist_finetune.cli import leave_at_once
from dist_finetune.errors import DistFinetuneError
from dist_finetune.spec_file import load_spec
from dist_finetune.worker import run_task


def run_job(job: dict[str, Any], rank: int) -> dict[str, Any]:
    overrides = [*job.get("overrides", ()), *job.get("by_rank", {}).get(str(rank), ())]
    try:
        return {"summary": run_task(load_spec(job["config"], overrides)).to_json()}
    except DistFinetuneError as error:
        return {"error": type(error).__name__, "message": str(error), "exit_code": error.exit_code}


def main() -> None:
    jobs, results = Path(sys.argv[1]), Path(sys.argv[2])
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    rank = dist.get_rank()
    done = {job["name"]: run_job(job, rank) for job in json.loads(jobs.read_text(encoding="utf-8"))}
    assert dist.is_initialized(), "a run ended a process group that it had not made"
    results.with_name(f"{results.name}.{rank}").write_text(json.dumps(done), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    leave_at_once(0)
