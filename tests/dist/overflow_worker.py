"""As worker.py, from a loss scale so high that the gradients of the first fp16 steps overflow."""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import worker

from dist_finetune.cli import leave_at_once
from dist_finetune.engine import precision

if __name__ == "__main__":
    precision.FIRST_SCALE = 2.0**26
    worker.main()
    leave_at_once(0)
