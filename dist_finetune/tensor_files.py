"""Writing safetensors files as any other file of a run: with the permissions that a new file has here."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes tensors by name. safetensors leaves a file that its owner alone can read, so that a colleague could list
    a run but not load its model."""
    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path, metadata)
    with suppress(OSError):  # a file system without permissions
        path.chmod(mode)
