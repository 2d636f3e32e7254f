"""Whether a model takes images of the size that the data section asks for, found without reading a weight."""

import torch
from torch import nn

from dist_finetune.errors import UserError
from dist_finetune.models.card import ModelCard
from dist_finetune.models.on_meta import on_meta
from dist_finetune.models.sources import build_model, describe_model, for_task, forward_logits
from dist_finetune.models.weights import first_line
from dist_finetune.spec import ModelSpec


def refuse_image_size(model: nn.Module, card: ModelCard, spec: ModelSpec, classes: tuple[str, ...]) -> None:
    """Raises UserError where a pass of one image fails and one of the model's own size does not; `model` lies on the
    meta device. A model that can't be run there at all may take any."""
    problem = _problem(model, card)
    if problem is None:
        return
    own = for_task(describe_model(spec), card.task)
    with on_meta():
        plain = build_model(own, spec, classes)
    if card.image is not None and own.image is not None and _problem(plain, own) is None:
        asked, works = (f"{height}x{width}" for height, width in (card.image.size, own.image.size))
        raise UserError(
            f"data.image_size: {card.name} can't take images of {asked} pixels ({problem}). Leave data.image_size out "
            f"for the model's own {works}, or try another"
        )


def _problem(model: nn.Module, card: ModelCard) -> str | None:
    """Why a pass of one image fails, None where it runs."""
    assert card.image is not None
    modes = [(module, module.training) for module in model.modules()]
    model.eval()  # BatchNorm takes no single row in training
    try:
        with torch.device("meta"), torch.no_grad():
            forward_logits(model, torch.zeros(1, 3, *card.image.size))
    except Exception as error:  # each model refuses in its own way
        return first_line(error)
    finally:
        for module, was_training in modes:
            module.training = was_training
    return None
