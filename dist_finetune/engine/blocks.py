"""What is done to a model block by block before it is sharded: recomputation in the backward pass, and compilation.

Both replace the forward of the block's modules and leave modules, names and hooks as they are, so that engines, freeze
and checkpoints see the model that the plan describes.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dist_finetune.lint import first_trainable_part
from dist_finetune.models.structure import Part
from dist_finetune.phases import PhasePlan
from dist_finetune.plan import Plan

Forward = Callable[..., Any]


def prepare_blocks(model: nn.Module, plan: Plan, phase: PhasePlan) -> None:
    """Compiles every block, and makes those that the backward pass goes through recompute, as the plan asks."""
    train, parts = plan.spec.train, plan.structure.parts
    first = first_trainable_part(phase.manifest, plan.structure)
    passed = parts if first.kind == "other" else parts[parts.index(first) :]
    for block in plan.structure.blocks:
        for module in _called(model, block):
            if train.compile:
                # lengths of texts differ from batch to batch
                module.forward = torch.compile(module.forward, dynamic=True if plan.data.modality == "text" else None)
            if train.gradient_checkpointing and block in passed:
                module.forward = _recomputed(module.forward)


def _called(model: nn.Module, block: Part) -> Iterator[nn.Module]:
    """The modules of a block that the model calls; a cached prefix has left its blocks without parameters."""
    modules = dict(model.named_modules())
    for path in block.modules:
        module = modules.get(path)
        if module is None or isinstance(module, nn.ModuleList | nn.ModuleDict):
            continue
        is_done = "forward" in module.__dict__  # two blocks may share a module
        if not is_done and any(True for _ in module.parameters()):
            yield module


def _recomputed(forward: Forward) -> Forward:
    """`forward` without kept activations. Not torch's reentrant form, which gives no gradients to a block whose input
    needs none, as after a frozen prefix (transformers#23170)."""

    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run
