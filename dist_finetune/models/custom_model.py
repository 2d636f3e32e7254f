"""A model of the user's own: `module:function`, called as function(num_classes=N).

Attributes that the function may carry: `modality` ("text" or "image"; without it, a model whose forward takes
`input_ids` is one of text), `image_size`, `image_mean`, `image_std`, `max_length`, `tokenizer` (hub id or folder).
"""

import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from dist_finetune.data.image_input import ImageInput
from dist_finetune.errors import UserError, did_you_mean
from dist_finetune.models.card import CNN_LR, TRANSFORMER_LR, ModelCard, Provenance
from dist_finetune.models.dropout import set_dropout
from dist_finetune.models.saved import WEIGHTS, built_by, saved_folder, saved_for, saved_image
from dist_finetune.models.weights import (
    files_sha256,
    head_tensors,
    load_body,
    read_weights,
    seeded,
    tensors_sha256,
    weights_file,
)
from dist_finetune.spec import ModelSpec


def describe_custom(spec: ModelSpec, location: str, data_image_size: int | None) -> ModelCard:
    """The card of the user's own model. Raises UserError where the function can't be found or builds no module."""
    function, folder = _function(built_by(location)), saved_folder(location)
    modality = _modality(function, spec.name)
    image = saved_image(folder) if folder and modality == "image" else None
    if modality == "image":
        size = data_image_size or (image.size[0] if image else _whole_number(function, "image_size", 224, spec.name))
        image = ImageInput(
            size=(size, size),
            mean=image.mean if image else tuple(getattr(function, "image_mean", ImageInput.mean)),
            std=image.std if image else tuple(getattr(function, "image_std", ImageInput.std)),
        )
    return ModelCard(
        source="custom",
        name=spec.name,
        location=location,
        modality=modality,
        image=image,
        max_length=_whole_number(function, "max_length", 512, spec.name) if modality == "text" else None,
        pretrained=folder is not None or spec.weights not in ("pretrained", "none"),
        default_lr=TRANSFORMER_LR if modality == "text" else CNN_LR,
    )


def build_custom(card: ModelCard, spec: ModelSpec, classes: tuple[str, ...]) -> nn.Module:
    """What the user's function returns for so many classes, with `model.dropout` set."""
    return _create(card, spec, len(classes))


def load_custom(card: ModelCard, spec: ModelSpec, classes: tuple[str, ...], seed: int) -> tuple[nn.Module, Provenance]:
    """The user's model in fp32 on the CPU: with a file's or exported weights, else as the function returns it."""
    with seeded(seed):
        model = _create(card, spec, len(classes)).float()
    folder = saved_folder(card.location) if spec.weights == "pretrained" else None
    file = folder / WEIGHTS if folder else weights_file(spec.weights)
    if file is None:
        state = model.state_dict()
        return model, Provenance(card.name, None, tensors_sha256(state), (), tuple(state), False)
    head_kept = folder is not None and saved_for(folder) == (card.task, classes)
    head = head_tensors(lambda n: _create(card, spec, n), len(classes))
    missing = load_body(model, read_weights(file), head, head_kept, f"model.name {card.name}: {file}")
    return model, Provenance(card.name, None, files_sha256([file]), (file.name,), missing, head_kept)


def files_custom(card: ModelCard) -> list[Path]:
    """The weights of an exported folder; a function of the user's brings its own."""
    folder = saved_folder(card.location)
    return [folder / WEIGHTS] if folder else []


def custom_tokenizer_location(card: ModelCard) -> str:
    """Hub id or folder of the tokenizer that the function names, or of the exported folder that holds one."""
    folder = saved_folder(card.location)
    if folder and any(folder.glob("tokenizer*")):
        return str(folder)
    named = getattr(_function(built_by(card.location)), "tokenizer", None)
    if not isinstance(named, str):
        raise UserError(
            f"model.name {card.name}: a text model needs a tokenizer; give the function an attribute `tokenizer` that "
            f"holds a hub id or a folder"
        )
    return named


def _create(card: ModelCard, spec: ModelSpec, num_classes: int) -> nn.Module:
    model = _call(_function(built_by(card.location)), num_classes, card.name)
    if spec.dropout is not None:
        set_dropout(model, spec.dropout)
    return model


def _call(function: Callable[..., Any], num_classes: int, name: str) -> nn.Module:
    try:
        model = function(num_classes=num_classes)
    except Exception as error:
        # The user's code may raise anything; it ends up in one readable line, the traceback under --debug.
        on_meta = torch.get_default_device().type == "meta"
        where = (
            " on the meta device (plans are made there, without memory: it should only create layers)"
            if on_meta
            else ""
        )
        raise UserError(
            f"model.name {name}: calling it with num_classes={num_classes} failed{where}: {error!r}"
        ) from error
    if not isinstance(model, nn.Module):
        raise UserError(f"model.name {name}: it returned {type(model).__name__}, not a torch.nn.Module")
    tensors = (*model.named_parameters(), *model.named_buffers())
    if lazy := [tensor_name for tensor_name, tensor in tensors if is_lazy(tensor)]:
        raise UserError(
            f"model.name {name}: {lazy[0]} has no shape before a first forward pass, and plans are made before it; "
            "write layers with their sizes in place of Lazy ones"
        )
    return model


def _function(location: str) -> Callable[..., Any]:
    module_name, _, attribute = location.partition(":")
    # Console scripts and `python -m` under launchers differ in whether the current folder can be imported from.
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = (
            f"{module_name} "
            if error.name and module_name.startswith(error.name)
            else f"{error.name}, which it imports, "
        )
        raise UserError(
            f"model.name {location}: the Python module {missing}was not found. Run from its folder, "
            f"or put that on PYTHONPATH"
        ) from None
    except Exception as error:
        raise UserError(f"model.name {location}: importing {module_name} failed: {error!r}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        names = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        raise UserError(
            f"model.name {location}: {module_name} has no function {attribute}. {did_you_mean(attribute, names)}"
        )
    return function


def _whole_number(function: Callable[..., Any], attribute: str, default: int, name: str) -> int:
    value = getattr(function, attribute, default)
    try:
        return int(value)
    except (TypeError, ValueError):
        raise UserError(
            f"model.name {name}: its attribute {attribute} is {value!r}; it must be a whole number, such as {default}"
        ) from None


def _modality(function: Callable[..., Any], name: str) -> Literal["text", "image"]:
    stated = getattr(function, "modality", None)
    if stated is not None:
        if stated not in ("text", "image"):
            raise UserError(f"model.name {name}: its attribute modality is {stated!r}; it must be 'text' or 'image'")
        return "text" if stated == "text" else "image"
    with torch.device("meta"):
        model = _call(function, 2, name)
    return "text" if "input_ids" in inspect.signature(model.forward).parameters else "image"
