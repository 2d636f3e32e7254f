"""Starts ranks without paying their imports again: forked.py, which reads one launch a line from its standard input.

Importing torch, transformers and DeepSpeed takes a process longer than most of the trainings here. This process imports
them once, opens no process group and no model, and forks itself for each rank of each launch; each rank is then as a
fresh one. A launch is {"script", "arguments", "num_processes", "port", "folder", "env"}: its ranks run in FOLDER as
torchrun would start them, and their output and then their common exit status go into files there. The answer is one
line, the process group to kill. Tests of launchers, signals and start-up start real ones instead.

"env" are variables for its ranks. What reads a variable while it is imported has read it already.
"""

import gc
import json
import os
import runpy
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import accelerate  # noqa: F401
import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
import matplotlib.figure  # noqa: F401
import timm  # noqa: F401
from transformers import BertForSequenceClassification, BertForTokenClassification, BertTokenizerFast  # noqa: F401

import dist_finetune.cli
import dist_finetune.html_report.page
import dist_finetune.run  # noqa: F401

GRACE_S = 20.0
"""How long the other ranks may take to end by themselves once one has failed: each has its own words to say."""


def run_rank(launch: dict[str, Any], rank: int) -> None:
    size = launch["num_processes"]
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "localhost", "MASTER_PORT": str(launch["port"]), "TORCHELASTIC_RUN_ID": "forked",
        **launch["env"],
    }  # fmt: skip
    sys.argv = [launch["script"], *launch["arguments"]]
    sys.path[:0] = [str(Path(launch["script"]).parent), *filter(None, launch["env"].get("PYTHONPATH", "").split(":"))]
    status: object = 0
    try:
        runpy.run_path(launch["script"], run_name="__main__")
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    if isinstance(status, str):  # as Python does with words that a program exits with
        print(status, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else 1)


def run_ranks(launch: dict[str, Any], server: int) -> int:
    """The exit status of the first rank that failed, or 0. Ranks that are left GRACE_S later are killed."""
    ranks: set[int] = set()
    for rank in range(launch["num_processes"]):
        child = os.fork()
        if child == 0:
            run_rank(launch, rank)
        ranks.add(child)
    failed, last_s = 0, float("inf")
    while ranks:
        child, code = os.waitpid(-1, os.WNOHANG)
        ranks.discard(child)
        if child and code and not failed:
            failed, last_s = os.waitstatus_to_exitcode(code), time.monotonic() + GRACE_S
        if time.monotonic() > last_s or os.getppid() != server:
            for rank in ranks:
                os.kill(rank, signal.SIGKILL)
        time.sleep(0.0 if child else 0.02)
    return failed


def run_launch(launch: dict[str, Any], server: int) -> None:
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.chdir(launch["folder"])
    for number, name in ((0, os.devnull), (1, "ranks.out"), (2, "ranks.err")):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
    status = run_ranks(launch, server)
    Path("ranks.part").write_text(str(status), encoding="utf-8")
    Path("ranks.part").rename("ranks.status")


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # ended launches leave no zombies
    server = os.getpid()
    gc.freeze()  # what was imported stays: no collection of a rank needs to look at it, or to copy its pages
    print("ready", flush=True)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            try:
                run_launch(json.loads(line), server)
            finally:
                os._exit(0)
        print(child, flush=True)


if __name__ == "__main__":
    main()
