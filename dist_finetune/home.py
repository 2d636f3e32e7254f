"""Paths that begin with `~`, which YAML, unlike a shell, leaves as they are."""

from pathlib import Path

from dist_finetune.errors import UserError


def expand_home(path: str | Path) -> Path:
    """`path` with `~` or `~user` as the home of whoever runs this here. Raises UserError for one that isn't known."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        home = Path(path).parts[0]
        raise UserError(f"{path}: no home folder is known here for {home}; write the path without `~`") from None
