"""The order in which a forward pass calls a model's modules, which need not be the one in which they are registered."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from dist_finetune.models.card import ModelCard
from dist_finetune.models.sources import forward_logits
from dist_finetune.models.structure import Structure, structure_of

NUM_TOKENS = 8


def structure_for(model: nn.Module, card: ModelCard) -> Structure:
    """The structure map of the model of `card`.

    Libraries register modules in the order of their calls, which tests/unit/test_structure.py proves family by family;
    what others wrote is run for its order, which on the meta device takes about a second for a large model.
    """
    foreign = card.source == "custom" or card.trust_remote_code
    return structure_of(model, visit_order(model, card) if foreign else ())


def visit_order(model: nn.Module, card: ModelCard) -> tuple[str, ...]:
    """Dotted paths of the modules that a pass of one row calls, in the order of their first call; none where the model
    can't be run without values.

    On the meta device it reads and computes nothing. Modules without tensors that are called more than once, such as
    one dropout for several places, have no place of their own and are left out.
    """
    device = next(iter([*model.parameters(), *model.buffers()]), torch.empty(0)).device
    paths = {id(module): path for path, module in model.named_modules()}
    calls: list[nn.Module] = []
    hooks = [module.register_forward_pre_hook(lambda called, _: calls.append(called)) for module in model.modules()]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()  # BatchNorm takes no single row in training
    try:
        with torch.no_grad(), device:
            ran = any(_runs(model, inputs, calls) for inputs in _inputs(card))
    finally:
        for hook in hooks:
            hook.remove()
        for module, was_training in modes:
            module.training = was_training
    if not ran:
        return ()
    counts: dict[int, int] = {}
    for module in calls:
        counts[id(module)] = counts.get(id(module), 0) + 1
    once = [m for m in dict.fromkeys(calls) if counts[id(m)] == 1 or next(m.parameters(), None) is not None]
    return tuple(paths[id(module)] for module in once)


def _runs(model: nn.Module, inputs: Any, calls: list[nn.Module]) -> bool:
    calls.clear()
    try:
        forward_logits(model, inputs)
    except Exception:  # a user's model may do anything; what it registers first then counts as first
        return False
    return True


def _inputs(card: ModelCard) -> Sequence[Any]:
    """Inputs of one row on the current default device, as the loaders make them. Values of a mask are often asked for,
    and on the meta device there are none: the last try is without one."""
    if card.image is not None:
        return [torch.zeros(1, 3, *card.image.size)]
    ids = torch.zeros(1, min(NUM_TOKENS, card.max_length or NUM_TOKENS), dtype=torch.int64)
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}, {"input_ids": ids}]
