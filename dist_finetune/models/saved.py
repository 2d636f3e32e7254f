"""The small JSON beside exported weights of torchvision and user models: how to build them again."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dist_finetune.data.image_input import ImageInput
from dist_finetune.errors import UserError
from dist_finetune.home import expand_home
from dist_finetune.models.card import ModelCard
from dist_finetune.tasks.names import TaskName

FILE = "dist_finetune_model.json"
WEIGHTS = "model.safetensors"
HOW_TO_LOAD = {
    "torchvision": "model = torchvision.models.get_model(built_by, **built_with); "
    "model.load_state_dict(safetensors.torch.load_file('model.safetensors'))",
    "custom": "model = function(**built_with), the function that built_by names as module:function; "
    "model.load_state_dict(safetensors.torch.load_file('model.safetensors'))",
}


def write_saved(card: ModelCard, classes: tuple[str, ...], options: dict[str, Any], folder: Path) -> None:
    """Writes the JSON that `read_saved` and people read."""
    whole = {
        "format": 1,
        "source": card.source,
        "built_by": built_by(card.location),
        "built_with": options,
        "classes": list(classes),
        "task": card.task,
        "modality": card.modality,
        "image": asdict(card.image) if card.image else None,
        "max_length": card.max_length,
        "how_to_load": HOW_TO_LOAD[card.source],
    }
    (folder / FILE).write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_saved(folder: Path) -> dict[str, Any]:
    """What `write_saved` wrote. Raises UserError where it is damaged."""
    try:
        whole = json.loads((folder / FILE).read_text(encoding="utf-8"))
        if whole["format"] != 1 or whole["source"] not in HOW_TO_LOAD or not whole["built_by"]:
            raise ValueError("written by another version")
        return dict(whole)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / FILE}: can't be read: {error!r}") from None


def saved_for(folder: Path) -> tuple[TaskName, tuple[str, ...]]:
    """The task and the classes that the exported model is for."""
    whole = read_saved(folder)
    return whole.get("task", "classification"), tuple(whole["classes"])


def saved_folder(location: str) -> Path | None:
    """The folder, where `location` is one; None for an architecture's name or a function."""
    path = expand_home(location)
    return path if (path / FILE).is_file() else None


def built_by(location: str) -> str:
    """The architecture or `module:function` behind a location, which may be an exported folder."""
    folder = saved_folder(location)
    return str(read_saved(folder)["built_by"]) if folder else location


def saved_image(folder: Path) -> ImageInput | None:
    """The image input that an exported folder states."""
    return image_of(read_saved(folder)["image"])


def image_of(image: dict[str, Any] | None) -> ImageInput | None:
    """The image input that was written as JSON; None for a model of text."""
    if image is None:
        return None
    return ImageInput(
        size=(int(image["size"][0]), int(image["size"][1])),
        mean=tuple(image["mean"]),
        std=tuple(image["std"]),
        interpolation=str(image["interpolation"]),
        crop_fraction=float(image["crop_fraction"]),
    )
