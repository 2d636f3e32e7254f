"""The worker as a script, for launchers that start one: `accelerate launch launch/train.py CONFIG [key=value ...]`."""

import sys

from dist_finetune.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
