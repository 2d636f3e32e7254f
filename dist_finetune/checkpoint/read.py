"""Finding, proving and loading a checkpoint, at any world size and under any strategy."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from dist_finetune.checkpoint.hashing import sha256_of
from dist_finetune.checkpoint.layout import COMPLETE, FORMAT_VERSION, STATE, WHOLE, checkpoint_folders
from dist_finetune.engine import Engine
from dist_finetune.errors import TrainingError


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files are all there and whose hashes hold."""

    folder: Path
    state: dict[str, Any]
    pieces: Mapping[str, tuple[tuple[int, Path, str], ...]]
    """By "kind:name": (offset, file, key) of each piece, in order."""

    def names(self, kind: str) -> list[str]:
        """Names that have tensors of a kind: weight, exp_avg, exp_avg_sq, buffer, settled."""
        return [key.partition(":")[2] for key in self.pieces if key.startswith(f"{kind}:")]

    def read(self, kind: str, name: str) -> torch.Tensor:
        """The whole tensor: flat fp32 of a weight or moment, in its own shape and type otherwise."""
        parts = []
        for _, file, key in self.pieces[f"{kind}:{name}"]:
            with safe_open(file, framework="pt") as opened:
                parts.append(opened.get_tensor(key))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def newest_complete(run: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose files hold what COMPLETE says; `say` is told of each newer one that doesn't."""
    for folder in checkpoint_folders(run):
        problem = damage(folder)
        if problem is None:
            return folder
        say(f"WARNING {folder.name} is damaged ({problem}); trying the checkpoint before it")
    return None


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files; None where sizes and hashes hold and nothing is there besides."""
    try:
        complete = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))
        files = complete["files"]
        if complete["format"] != FORMAT_VERSION:
            return f"format {complete['format']}, this version reads {FORMAT_VERSION}"
        # hidden files are what network file systems and desktops leave
        strangers = {p.name for p in folder.iterdir() if not p.name.startswith(".")} - set(files) - {COMPLETE}
        if strangers:
            return f"{sorted(strangers)[0]} does not belong to it"
        for name, expected in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["size"]:
                return f"{name} has {path.stat().st_size:,} bytes instead of {expected['size']:,}"
            if sha256_of(path) != expected["sha256"]:
                return f"{name} was changed: its sha256 differs"
    except OSError as error:
        return f"{error.filename} can't be read: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{COMPLETE} is not what was written"
    return None


def open_checkpoint(folder: Path) -> Checkpoint:
    """Reads the state and the tensors' names of a checkpoint; no tensor is read yet."""
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    files = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))["files"]
    pieces: dict[str, list[tuple[int, Path, str]]] = {}
    for file in sorted(folder / name for name in files if name != STATE):
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 (not a mapping)
                label, _, offset = key.rpartition("@") if key.partition(":")[0] not in WHOLE else (key, "", "0")
                pieces.setdefault(label, []).append((int(offset), file, key))
    return Checkpoint(folder, state, {label: tuple(sorted(found)) for label, found in pieces.items()})


def load_weights(model: nn.Module, checkpoint: Checkpoint) -> tuple[str, ...]:
    """Puts trained weights and moved buffers into a whole, unsharded model that holds the base weights; returns their
    names.

    Raises TrainingError where a tensor does not fit.
    """
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    loaded = [(kind, name) for kind in ("settled", "buffer", "weight") for name in checkpoint.names(kind)]
    with torch.no_grad():
        for kind, name in loaded:
            value = checkpoint.read(kind, name)
            if name not in tensors or tensors[name].numel() != value.numel():
                raise TrainingError(f"{checkpoint.folder.name}: {kind} {name} does not fit this model")
            tensors[name].copy_(value.view(tensors[name].shape))
    return tuple(dict.fromkeys(name for _, name in loaded))


def load_moments(engine: Engine, checkpoint: Checkpoint, steps: Mapping[str, int]) -> None:
    """Puts Adam moments and step counts into a fresh engine: by name, whatever strategy or world size saved them.

    A parameter that the checkpoint does not hold starts from nothing, as one that a new phase thaws.
    """
    saved = set(checkpoint.names("exp_avg"))
    for fragment in engine.fragments():
        if fragment.name in saved:
            for kind, moment in fragment.moments.items():
                whole = checkpoint.read(kind, fragment.name)
                moment.copy_(whole[fragment.offset : fragment.offset + moment.numel()])
    engine.set_adam_steps({name: steps.get(name, 0) for name in engine.adam_steps()})
