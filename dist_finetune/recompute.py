"""Blocks whose activations are computed again in the backward pass instead of being kept: whose, and how."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint, noop_context_fn

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


def recomputed(forward: Forward, norms: Sequence[_BatchNorm] = (), keep_random_state: bool = True) -> Forward:
    """`forward` without kept activations, and with the running statistics of its `norms` moved once. Not torch's
    reentrant form, which gives no gradients to a block whose input needs none, as after a frozen prefix
    (transformers#23170)."""
    contexts = (lambda: (nullcontext(), without_statistics(norms))) if norms else noop_context_fn

    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(
            _by_name(forward, len(args), tuple(kwargs)),
            *args,
            *kwargs.values(),
            use_reentrant=False,
            preserve_rng_state=keep_random_state,
            context_fn=contexts,
        )

    return run


def _by_name(forward: Forward, num_positional: int, names: Sequence[str]) -> Forward:
    """`forward` with its named arguments behind the others. torch looks at those alone for the GPU whose random numbers
    it repeats: a block that is given all by name would draw another dropout in the second pass."""

    def call(*args: Any) -> Any:
        return forward(*args[:num_positional], **dict(zip(names, args[num_positional:], strict=True)))

    return call


@contextmanager
def without_statistics(norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """BatchNorm that normalises by its batch and leaves its running statistics alone, in a pass that is no step of the
    training: one to find the cut, or a second one, where the first has moved them (pytorch#96136)."""
    moving = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms if norm.training]
    for norm, _, count in moving:
        norm.momentum, norm.num_batches_tracked = 0.0, None if count is None else count.clone()
    try:
        yield
    finally:
        for norm, momentum, count in moving:
            norm.momentum, norm.num_batches_tracked = momentum, count
