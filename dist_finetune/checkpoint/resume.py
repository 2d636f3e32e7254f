"""Where an existing run goes on: the newest checkpoint whose hashes hold and that is really this run's."""

from typing import Any

from dist_finetune.checkpoint.read import Checkpoint, newest_complete, open_checkpoint
from dist_finetune.errors import UserError
from dist_finetune.job import Job, Progress, identity
from dist_finetune.models.card import Provenance
from dist_finetune.world import on_first


def find_start(job: Job, provenance: Provenance, fresh: bool) -> tuple[Checkpoint | None, Progress]:
    """The checkpoint to go on from and the progress it holds; (None, a fresh Progress) where the run has none.

    Raises UserError where the newest good checkpoint was made with another freeze, base model, data or batch size.
    """
    folder = None if fresh else on_first(job.world, lambda: newest_complete(job.folder, job.report.say))
    if folder is None:
        return None, Progress()
    checkpoint = open_checkpoint(folder)
    refuse_other_run(checkpoint, identity(job.plan, provenance))
    progress = Progress(**checkpoint.state["progress"])
    progress.attempts += 1
    job.report.say(f"going on from {folder.name} of {job.plan.total_steps} steps, attempt {progress.attempts}")
    return checkpoint, progress


def refuse_other_run(checkpoint: Checkpoint, wanted: dict[str, Any]) -> None:
    """Raises UserError that names each difference between what a checkpoint was made with and `wanted`."""
    saved = checkpoint.state["identity"]
    differences = [
        f"{key}: {_short(saved.get(key))} in the checkpoint, {_short(value)} now"
        for key, value in wanted.items()
        if saved.get(key) != value
    ]
    if differences:
        raise UserError(
            f"{checkpoint.folder} can't go on with this config:\n"
            + "\n".join(f"  {line}" for line in differences)
            + "\nRestore what differs, or start over with --fresh (the old folder is kept aside)."
        )


def _short(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_short(v) for v in value[:8]) + (", ..." if len(value) > 8 else "") + "]"
    return str(value)[:16]
