"""What a run's checkpoints are worth, for `dist-finetune verify`."""

from pathlib import Path

from dist_finetune.checkpoint.layout import COMPLETE, FOLDER, checkpoint_folders, step_of
from dist_finetune.checkpoint.read import damage, open_checkpoint
from dist_finetune.errors import UserError


def verify_path(path: Path) -> tuple[list[str], bool]:
    """Lines for the user, and whether something can be resumed, of a run's folder or one checkpoint's.

    Raises UserError where the path is neither.
    """
    if step_of(path) is not None and path.is_dir():
        return _verify([path])
    if not (path / "config.yaml").exists():
        raise UserError(f"{path} is neither a run (it has no config.yaml) nor a checkpoint (step-NNNNNN)")
    folders = checkpoint_folders(path)
    lines, is_good = _verify(folders)
    root = path / FOLDER
    parts = sorted(p.name for p in root.iterdir() if p not in folders) if root.is_dir() else []
    lines += [f"{name}: incomplete, never used" for name in parts]
    if not folders:
        lines.append(f"{path} has no checkpoint: resuming starts from the first step")
    return lines, is_good


def _verify(folders: list[Path]) -> tuple[list[str], bool]:
    lines, newest = [], None
    for folder in folders:
        problem = damage(folder) if (folder / COMPLETE).exists() else f"{COMPLETE} is missing: it was never finished"
        if problem:
            lines.append(f"{folder.name}: damaged: {problem}")
            continue
        newest = newest or folder
        state = open_checkpoint(folder).state
        size = sum(p.stat().st_size for p in folder.iterdir())
        lines.append(
            f"{folder.name}: ok, {size / 2**20:,.1f} MiB, saved by {state['world_size']} x {state['strategy']}"
        )
    if newest:
        lines.append(f"resuming would go on from {newest.name}")
    return lines, newest is not None
