"""The format of a checkpoint: plain safetensors by parameter name, and JSON. No pickle, no world size, no strategy.

    checkpoints/step-000123/
        rank-00000.safetensors   weight:NAME@OFFSET, exp_avg:NAME@OFFSET, exp_avg_sq:... (flat fp32 pieces)
                                 buffer:NAME, settled:NAME  (whole; rank 0: what moved, or trained in an earlier phase)
        state.json               where the run was: step, phase, scores, Adam step counts, what it started from
        COMPLETE                 size and sha256 of each file; written last: a folder without it is no checkpoint

A piece is `offset` elements into the flattened parameter; the pieces of all files together are every trainable
parameter once. Frozen tensors are not stored: they come from the base model, whose hash state.json holds.
Random numbers need no state: they are drawn anew for (seed, step, rank) at each optimizer step.
"""

import re
from pathlib import Path

FOLDER = "checkpoints"
STATE = "state.json"
COMPLETE = "COMPLETE"
FORMAT_VERSION = 1
WHOLE = ("buffer", "settled")


def folder_name(step: int) -> str:
    """Name of the checkpoint taken after optimizer step `step`."""
    return f"step-{step:06d}"


def step_of(folder: Path) -> int | None:
    """The step of a checkpoint's folder name; None for any other folder."""
    found = re.fullmatch(r"step-(\d{6,})", folder.name)
    return int(found[1]) if found else None


def shard_name(rank: int) -> str:
    """The file that rank `rank` writes."""
    return f"rank-{rank:05d}.safetensors"


def checkpoint_folders(run: Path) -> list[Path]:
    """Folders of complete checkpoints of a run, newest first. Their hashes are not checked here."""
    root = run / FOLDER
    found = [p for p in root.iterdir() if step_of(p) is not None and (p / COMPLETE).is_file()] if root.is_dir() else []
    return sorted(found, key=lambda p: step_of(p) or 0, reverse=True)
