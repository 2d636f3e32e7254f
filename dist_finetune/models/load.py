"""A model with its weights, the same on every rank."""

from collections.abc import Callable

from torch import nn

from dist_finetune.models.card import ModelCard, Provenance, Source
from dist_finetune.models.custom_model import load_custom
from dist_finetune.models.timm_model import load_timm
from dist_finetune.models.torchvision_model import load_torchvision
from dist_finetune.models.transformers_model import load_transformers
from dist_finetune.spec import ModelSpec

LOAD: dict[Source, Callable[[ModelCard, ModelSpec, tuple[str, ...], int], tuple[nn.Module, Provenance]]] = {
    "transformers": load_transformers,
    "timm": load_timm,
    "torchvision": load_torchvision,
    "custom": load_custom,
}


def load_model(card: ModelCard, spec: ModelSpec, classes: tuple[str, ...], seed: int) -> tuple[nn.Module, Provenance]:
    """The whole model in fp32 on the CPU, in train mode, and where its weights came from.

    The head starts from `seed`, unless the source was a classifier of the same `classes`; the caller's random
    numbers are left alone. A ZeRO-3 config that is alive does not partition it: freezing comes before sharding. Raises
    UserError where weights are missing, damaged, or don't fit, with the names that differ.
    """
    model, provenance = LOAD[card.source](card, spec, classes, seed)
    return model.train(), provenance
