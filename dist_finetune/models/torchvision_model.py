"""Classifiers of torchvision: an architecture by name, or a folder that an earlier run exported."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torchvision
from torch import nn
from torchvision.models import get_model, get_model_weights, list_models

from dist_finetune.data.image_input import ImageInput
from dist_finetune.errors import UserError, did_you_mean, nearest
from dist_finetune.models.card import CNN_LR, TRANSFORMER_LR, ModelCard, Provenance
from dist_finetune.models.dropout import set_dropout
from dist_finetune.models.hub import fetch_url
from dist_finetune.models.saved import WEIGHTS, built_by, saved_folder, saved_for, saved_image
from dist_finetune.models.weights import (
    files_sha256,
    head_tensors,
    load_body,
    read_weights,
    restart_heads,
    seeded,
    tensors_sha256,
    weights_file,
)
from dist_finetune.spec import ModelSpec

# Only in training do these return more than logits; a fine-tuned model has no use for their second classifiers.
AUXILIARY = {"googlenet": ("aux1.", "aux2."), "inception_v3": ("AuxLogits.",)}
# Their published weights came from TensorFlow: torchvision normalises by ImageNet's numbers and then, inside the model,
# turns that into these. Taken directly, a model built without that switch computes the same.
TENSORFLOW_MEAN_STD = (0.5, 0.5, 0.5)


def describe_torchvision(spec: ModelSpec, location: str, data_image_size: int | None) -> ModelCard:
    """The card of a torchvision classifier. Raises UserError for a name it does not have, with the nearest."""
    architecture, folder = built_by(location), saved_folder(location)
    valid = list_models(module=torchvision.models)
    if architecture not in valid:
        near = nearest(architecture, valid)
        raise UserError(
            f"model.name {spec.name}: torchvision {torchvision.__version__} has no such classifier. "
            f"{did_you_mean(architecture, near) if near else 'It has ' + ', '.join(valid)}"
        )
    image = (saved_image(folder) if folder else None) or _image_input(architecture)
    if data_image_size:
        image = replace(image, size=(data_image_size, data_image_size))
    return ModelCard(
        source="torchvision",
        name=spec.name,
        location=location,
        modality="image",
        image=image,
        max_length=None,
        pretrained=spec.weights != "none",
        default_lr=TRANSFORMER_LR if architecture.startswith(("vit", "swin", "maxvit")) else CNN_LR,
    )


def build_torchvision(card: ModelCard, spec: ModelSpec, classes: tuple[str, ...]) -> nn.Module:
    """A randomly initialised model with a head for `classes`, on the current default device."""
    return _create(card, spec, len(classes))


def load_torchvision(
    card: ModelCard, spec: ModelSpec, classes: tuple[str, ...], seed: int
) -> tuple[nn.Module, Provenance]:
    """The model with its weights in fp32 on the CPU, and where they came from; new tensors start from `seed`."""
    architecture, folder = built_by(card.location), saved_folder(card.location)
    with seeded(seed):
        model = _create(card, spec, len(classes))
    if spec.weights == "none":
        state = model.state_dict()
        return model, Provenance(card.name, None, tensors_sha256(state), (), tuple(state), False)
    file = weights_file(spec.weights)
    head_kept = file is None and folder is not None and saved_for(folder) == (card.task, classes)
    if file is None:
        file = folder / WEIGHTS if folder else _published_file(architecture, card.name)
    dropped = AUXILIARY.get(architecture, ())
    tensors = (
        {n: t for n, t in read_weights(file).items() if not n.startswith(dropped)} if dropped else read_weights(file)
    )
    head = head_tensors(lambda n: _create(card, spec, n), len(classes))
    missing = load_body(model, tensors, head, head_kept, f"model.name {card.name}: {file}")
    restart_heads(model, missing, seed)
    return model, Provenance(card.name, None, files_sha256([file]), (file.name,), missing, head_kept)


def files_torchvision(card: ModelCard) -> list[Path]:
    """The published or exported weights, fetched where that is needed and possible. Raises UserError."""
    folder = saved_folder(card.location)
    return [folder / WEIGHTS if folder else _published_file(built_by(card.location), card.name)]


def torchvision_options(card: ModelCard, num_classes: int) -> dict[str, Any]:
    """The keywords with which `torchvision.models.get_model` builds this model."""
    architecture = built_by(card.location)
    options: dict[str, Any] = {"num_classes": num_classes}
    if architecture in AUXILIARY:
        options["aux_logits"] = False
    if architecture.startswith("vit") and card.image is not None:
        options["image_size"] = card.image.size[0]
    return options


def _create(card: ModelCard, spec: ModelSpec, num_classes: int) -> nn.Module:
    architecture, options = built_by(card.location), torchvision_options(card, num_classes)
    if architecture in AUXILIARY:
        options["init_weights"] = True  # torchvision warns where this is left open
    try:
        model = get_model(architecture, weights=None, **options)
    except (AssertionError, ValueError, RuntimeError) as error:
        size = card.image.size if card.image else None
        raise UserError(
            f"model.name {card.name}: torchvision can't build it for images of {size} pixels: {error}"
        ) from None
    if spec.dropout is not None:
        set_dropout(model, spec.dropout)
    return model


def _image_input(architecture: str) -> ImageInput:
    weights = get_model_weights(architecture).DEFAULT
    preset = weights.transforms()
    crop, short = int(preset.crop_size[0]), int(preset.resize_size[0])
    return ImageInput(
        size=(crop, crop),
        mean=TENSORFLOW_MEAN_STD if architecture in AUXILIARY else tuple(preset.mean),
        std=TENSORFLOW_MEAN_STD if architecture in AUXILIARY else tuple(preset.std),
        interpolation=preset.interpolation.value if preset.interpolation.value != "nearest" else "bilinear",
        crop_fraction=min(1.0, crop / short),
    )


def _published_file(architecture: str, name: str) -> Path:
    return fetch_url(get_model_weights(architecture).DEFAULT.url, f"model.name {name}")
