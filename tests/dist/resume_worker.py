"""Runs that are stopped on the way, all in one process group: resume_worker.py JOBS.json RESULTS.json

JOBS.json is a list of {"config", "overrides", "changes", "stops", "only_stops"}. `stops` lists, for each attempt, how
many checks for a stop (one before each step and each evaluation batch) come before a real signal reaches one of the
ranks; after the last stop comes an attempt without, unless `only_stops`. RESULTS.json gets, for each job, what rank 0
saw: the messages of its stops, then its summary or its error.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import no_page  # noqa: F401
import torch.distributed as dist

from dist_finetune import stopping
from dist_finetune.cli import leave_at_once
from dist_finetune.errors import DistFinetuneError
from dist_finetune.run import train
from dist_finetune.spec_file import load_spec
from dist_finetune.stopping import Stopped, StopWish

check = StopWish.check
countdown = 0


def check_and_count(self: StopWish) -> None:
    """The real check; at the end of the countdown this process first gets a real signal."""
    global countdown
    countdown -= 1
    if countdown == 0:
        os.kill(os.getpid(), signal.SIGUSR1)
    check(self)


def run_job(job: dict[str, Any], rank: int, world_size: int) -> dict[str, Any]:
    global countdown
    seen: dict[str, Any] = {"stops": []}
    spec = load_spec(job["config"], job.get("overrides", ()))
    attempts = [*job.get("stops", ()), *([] if job.get("only_stops") else [0])]
    for attempt, after in enumerate(attempts):
        countdown = after if rank == attempt % world_size else 0
        try:
            seen["summary"] = train(spec, changes=job.get("changes", "none")).to_json()
        except Stopped as stopped:
            seen["stops"].append(str(stopped))
        except DistFinetuneError as error:
            return {**seen, "error": str(error), "exit_code": error.exit_code}
        else:
            break
    return seen


def main() -> None:
    StopWish.check = check_and_count  # type: ignore[method-assign]
    stopping.MOST_CALLS = 1  # at each call, as where steps are long: runs stop at the step that a test means
    jobs, results = Path(sys.argv[1]), Path(sys.argv[2])
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    seen = [run_job(job, rank, dist.get_world_size()) for job in json.loads(jobs.read_text(encoding="utf-8"))]
    if rank == 0:
        results.write_text(json.dumps(seen), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    leave_at_once(0)
