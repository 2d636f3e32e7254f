"""Blocks whose activations are computed again in the backward pass instead of being kept: whose, and how."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dist_finetune.freeze import Manifest
from dist_finetune.lint import first_trainable_part
from dist_finetune.models.structure import Part, Structure

Forward = Callable[..., Any]


def recomputed_blocks(manifest: Manifest, structure: Structure) -> Sequence[Part]:
    """The blocks that gradient checkpointing concerns: those that the backward pass goes through."""
    first = first_trainable_part(manifest, structure)
    passed = structure.parts if first.kind == "other" else structure.parts[structure.parts.index(first) :]
    return [block for block in structure.blocks if block in passed]


def called_modules(model: nn.Module, block: Part) -> Iterator[nn.Module]:
    """The modules of a block that the model calls; a cached prefix has left its blocks without parameters."""
    modules = dict(model.named_modules())
    for path in block.modules:
        module = modules.get(path)
        if module is None or isinstance(module, nn.ModuleList | nn.ModuleDict):
            continue
        is_done = "forward" in module.__dict__  # two blocks may share a module
        if not is_done and any(True for _ in module.parameters()):
            yield module


def recomputed(forward: Forward, keep_random_state: bool = True) -> Forward:
    """`forward` without kept activations. Not torch's reentrant form, which gives no gradients to a block whose input
    needs none, as after a frozen prefix (transformers#23170)."""

    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=keep_random_state, **kwargs)

    return run
