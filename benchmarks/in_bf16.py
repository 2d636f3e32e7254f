#!/usr/bin/env python3
"""Runs a script with matrix products and convolutions in bf16 on the CPU: in_bf16.py SCRIPT [ARGUMENT ...]"""

import runpy
import sys

import torch

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    with torch.autocast("cpu", torch.bfloat16):
        runpy.run_path(sys.argv[0], run_name="__main__")
