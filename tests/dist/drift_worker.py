"""A run in which one bit flips on rank 1: drift_worker.py CONFIG RESULTS.json STEP

After optimizer step STEP rank 1 changes the last bit of one weight, as failing memory would; STEP 0 changes nothing.
Each rank writes what it ended with, and at which steps replicas were compared, to RESULTS.json.RANK.
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
from dist_finetune.drift import DriftCheck
from dist_finetune.errors import DistFinetuneError
from dist_finetune.run import train
from dist_finetune.spec_file import load_spec

WEIGHT = "bert.encoder.layer.2.output.dense.weight"


def main() -> None:
    config, results, wanted = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    dist.init_process_group("gloo")
    compared: list[int] = []
    after = DriftCheck.after

    def flipping(check: DriftCheck, step: int, engine: Any) -> None:
        if step == wanted and dist.get_rank() == 1:
            engine.module.get_parameter(WEIGHT).data.view(-1)[:1].view(torch.int32).bitwise_xor_(1)
        if step >= check.next_step:
            compared.append(step)
        after(check, step, engine)

    DriftCheck.after = flipping  # type: ignore[method-assign]
    found: dict[str, Any] = {"error": None}
    try:
        train(load_spec(config, []))
    except DistFinetuneError as error:
        found = {"error": type(error).__name__, "message": str(error)}
    found["compared"] = compared
    results.with_name(f"{results.name}.{dist.get_rank()}").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    leave_at_once(0)
