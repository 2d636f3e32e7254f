"""The ways to name a model, and what follows from a name: its card, its module, its tokenizer."""

import importlib
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from dist_finetune.errors import UserError
from dist_finetune.home import expand_home
from dist_finetune.models import custom_model, saved
from dist_finetune.models.card import ModelCard, Source
from dist_finetune.models.config_json import read_json
from dist_finetune.models.demo import (
    EFFICIENTNET,
    EFFICIENTNET_ARCHITECTURE,
    check_demo_name,
    efficientnet_file,
    minilm_folder,
)
from dist_finetune.models.hub import TIMM_HUB, hub_folder
from dist_finetune.models.suggest import suggestions
from dist_finetune.models.weights import check_weights_option
from dist_finetune.spec import ModelSpec
from dist_finetune.tasks.names import TaskName

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
EXAMPLES = {"timm": "timm:resnet50", "torchvision": "torchvision:resnet50", "demo": "demo:minilm"}
HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")


def describe_model(spec: ModelSpec, data_image_size: int | None = None) -> ModelCard:
    """The card of the model that the spec names, from config files alone: no weights are read or needed.

    `data_image_size` is what the data section asks for. Raises UserError for a model that can't be found or can't do
    this, with the nearest names or the way to bring it, and for options that would have no effect.
    """
    check_weights_option(spec.weights)
    source, location = _locate(spec)
    _refuse_idle_options(spec, source, location)
    card: ModelCard = of_source(source, "describe")(spec, location, data_image_size)
    return card


def for_task(card: ModelCard, task: TaskName) -> ModelCard:
    """The card with a head for `task`. Raises UserError where the model has none for it."""
    if task == "token-classification":
        if card.modality == "image":
            raise UserError(f"task: {task} tags words, and {card.name} reads images; choose a model for text")
        if card.source == "transformers":
            from dist_finetune.models.transformers_config import require_tagger

            require_tagger(card)
    return replace(card, task=task)


def build_model(card: ModelCard, spec: ModelSpec, classes: tuple[str, ...]) -> nn.Module:
    """A randomly initialised model with a head of `card.task` with an output for each of `classes`, on the current
    default device (meta reads no weights).

    `spec.dropout` is set in all its dropouts; None leaves them.
    """
    module: nn.Module = of_source(card.source, "build")(card, spec, classes)
    return module


def of_source(source: Source, verb: Literal["describe", "build", "load", "export", "files"]) -> Callable[..., Any]:
    """`describe_timm`, `load_custom` and so on. Each library takes seconds to import, which a run pays for the one that
    its model comes from, and for no other."""
    module = importlib.import_module(f"dist_finetune.models.{source}_model")
    function: Callable[..., Any] = getattr(module, f"{verb}_{source}")
    return function


def load_tokenizer(card: ModelCard) -> "PreTrainedTokenizerBase":
    """The tokenizer of a text model. Raises UserError where its folder has none."""
    from dist_finetune.models.tokenizer import read_tokenizer

    location = custom_model.custom_tokenizer_location(card) if card.source == "custom" else card.location
    return read_tokenizer(card, location)


def forward_logits(model: nn.Module, inputs: dict[str, Tensor] | Tensor) -> Tensor:
    """Logits (B, num_classes), or (B, T, num_classes) of words, of keyword inputs (text) or images (B, C, H, W)."""
    output: Any = model(inputs) if isinstance(inputs, Tensor) else model(**inputs)
    logits = getattr(output, "logits", output)
    if not isinstance(logits, torch.Tensor):
        raise UserError(
            f"{type(model).__name__} returns {type(output).__name__}; a tensor, or an object with .logits, is needed"
        )
    return logits


def _locate(spec: ModelSpec) -> tuple[Source, str]:
    name = spec.name
    prefix, colon, rest = name.partition(":")
    if colon and prefix in ("timm", "torchvision", "demo") and not rest:
        raise UserError(f"model.name {name}: a model's name has to follow, such as {EXAMPLES[prefix]}")
    if colon and prefix in ("timm", "torchvision"):
        return ("timm" if prefix == "timm" else "torchvision"), rest
    if colon and prefix == "demo":
        check_demo_name(name)
        if name == EFFICIENTNET:
            if spec.weights == "pretrained":
                efficientnet_file()  # its absence is told before a plan is made
            return "timm", EFFICIENTNET_ARCHITECTURE
        return "transformers", str(minilm_folder())
    path = expand_home(name)
    try:
        if path.is_dir():
            return _locate_in(path, name), str(path)
    except OSError as error:
        raise UserError(f"model.name {name[:80]}...: {error.strerror}") from None
    if FUNCTION.fullmatch(name):
        return "custom", name
    if not HUB_ID.fullmatch(name) or name.endswith((".json", ".safetensors", ".bin", ".pth", ".pt")) or path.exists():
        what = "is a file; write its folder" if path.is_file() else "no such folder, and no hub id"
        raise UserError(f"model.name {name}: {what}. {suggestions(name) if not path.exists() else ''}".rstrip())
    folder = hub_folder(name, spec.revision, ["config.json"])
    return ("timm", f"{TIMM_HUB}{name}") if _locate_in(folder, name) == "timm" else ("transformers", name)


def _locate_in(folder: Path, name: str) -> Source:
    """The library that can read the model in `folder`."""
    if (folder / saved.FILE).is_file():
        return "torchvision" if saved.read_saved(folder)["source"] == "torchvision" else "custom"
    config = read_json(folder / "config.json")
    if config is None:
        inside = [
            d.name for d in sorted(folder.iterdir()) if (d / "config.json").is_file() or (d / saved.FILE).is_file()
        ]
        hint = f"Did you mean {Path(name) / inside[0]}?" if inside else "A model's folder holds a config.json."
        raise UserError(f"model.name {name}: this folder has no readable config.json. {hint}")
    return "timm" if "architecture" in config and "model_type" not in config else "transformers"


def _refuse_idle_options(spec: ModelSpec, source: Source, location: str) -> None:
    local = source in ("torchvision", "custom") or spec.name.startswith("demo:") or expand_home(location).is_dir()
    if spec.revision is not None and (local or (source == "timm" and not location.startswith(TIMM_HUB))):
        raise UserError(
            f"model.revision {spec.revision}: only a hub id has revisions, and {spec.name} is none; leave it out"
        )
    if spec.trust_remote_code and source != "transformers":
        raise UserError(f"model.trust_remote_code: {spec.name} brings no code from a hub; leave it out")
