"""Where an existing run goes on: the newest checkpoint whose hashes hold and that is really this run's."""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_finetune.checkpoint.layout import checkpoint_folders
from dist_finetune.checkpoint.read import Checkpoint, newest_complete, open_checkpoint
from dist_finetune.errors import UserError
from dist_finetune.freeze import Manifest
from dist_finetune.job import Job, Progress, identity
from dist_finetune.models.card import Provenance
from dist_finetune.run_folder import num_attempts
from dist_finetune.verdict import why_again
from dist_finetune.world import on_first

SHOWN = 5
HINTS = {
    "base model": "other base weights; frozen weights are not in a checkpoint, so restore those of the first start "
    "(model.name, model.revision, model.weights)",
    "data": "the rows or their order differ; restore the files or the version of the data set",
}


def find_start(job: Job, provenance: Provenance, fresh: bool) -> tuple[Checkpoint | None, Progress]:
    """The checkpoint to go on from and the progress it holds; None and none so far where the run has no checkpoint.

    Raises UserError where the newest good checkpoint was made with another freeze, base model, data or batch size, and
    where there are checkpoints, but none that is good: hours of work are not thrown away unasked.
    """
    folder, before = (None, 0) if fresh else on_first(job.world, lambda: (_newest(job), num_attempts(job.folder)))
    if folder is None:
        return None, Progress(attempts=before + 1)
    checkpoint = open_checkpoint(folder)
    refuse_other_run(checkpoint, identity(job.plan, provenance), [phase.manifest for phase in job.plan.phases])
    progress = Progress(**checkpoint.state["progress"])
    progress.attempts = max(progress.attempts, before) + 1
    after = f", after {why_again()}" if why_again() else ""
    job.report.say(f"going on from {folder.name} of {job.plan.total_steps} steps, attempt {progress.attempts}{after}")
    return checkpoint, progress


def _newest(job: Job) -> Path | None:
    folder = newest_complete(job.folder, job.report.say)
    if folder is None and checkpoint_folders(job.folder):
        raise UserError(
            f"{job.folder}: none of its checkpoints is whole (`dist-finetune verify {shlex.quote(str(job.folder))}` "
            "says why). Bring the files back, or start over with --fresh (the old folder is kept aside)."
        )
    return folder


def refuse_other_run(checkpoint: Checkpoint, wanted: Mapping[str, Any], manifests: list[Manifest]) -> None:
    """Raises UserError that names each difference between what a checkpoint was made with and `wanted`."""
    saved = checkpoint.state["identity"]
    differences = [
        f"{key}: {_short(saved.get(key))} in the checkpoint, {_short(value)} now" + _detail(key, checkpoint, manifests)
        for key, value in wanted.items()
        if saved.get(key) != value
    ]
    if differences:
        raise UserError(
            f"{checkpoint.folder} can't go on with this config:\n"
            + "\n".join(f"  {line}" for line in differences)
            + "\nRestore what differs, or start over with --fresh (the old folder is kept aside)."
        )


def _detail(key: str, checkpoint: Checkpoint, manifests: list[Manifest]) -> str:
    """What a difference of two hashes means; for the freeze the tensors by name, from the run's freeze.json."""
    if key != "freeze":
        return f" ({HINTS[key]})" if key in HINTS else ""
    try:
        recorded = json.loads((checkpoint.folder.parents[1] / "freeze.json").read_text(encoding="utf-8"))["phases"]
        then = {t["name"] for phase in recorded.values() for t in phase["tensors"] if t["frozen"]}
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    now = {r.name for manifest in manifests for r in manifest.records if r.frozen}
    parts = [("frozen before and not now", then - now), ("frozen now and not before", now - then)]
    return "".join(f"; {label}: {_names(names)}" for label, names in parts if names)


def _names(names: set[str]) -> str:
    shown = sorted(names)[:SHOWN]
    return ", ".join(shown) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _short(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_short(v) for v in value[:8]) + (", ..." if len(value) > 8 else "") + "]"
    return str(value)[:16]
