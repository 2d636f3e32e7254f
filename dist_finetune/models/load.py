"""A model with its weights, the same on every rank."""

from torch import nn

from dist_finetune.models.card import ModelCard, Provenance
from dist_finetune.models.sources import of_source
from dist_finetune.spec import ModelSpec


def load_model(card: ModelCard, spec: ModelSpec, classes: tuple[str, ...], seed: int) -> tuple[nn.Module, Provenance]:
    """The whole model in fp32 on the CPU, in train mode, and where its weights came from.

    The head starts from `seed`, unless the source was a classifier of the same `classes`; the caller's random
    numbers are left alone. A ZeRO-3 config that is alive does not partition it: freezing comes before sharding. Raises
    UserError where weights are missing, damaged, or don't fit, with the names that differ.
    """
    model: nn.Module
    model, provenance = of_source(card.source, "load")(card, spec, classes, seed)
    return model.train(), provenance
