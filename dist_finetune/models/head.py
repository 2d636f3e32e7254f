"""Finds the head of a model: the freshly initialised modules that turn features into logits."""

import re
from collections.abc import Iterator
from inspect import signature

from torch import nn

from dist_finetune.models.blocks import CONVOLUTIONS, Calls, children_of, has_params, join


def find_head(model: nn.Module, calls: Calls | None = None) -> tuple[str, ...]:
    """Dotted paths of the head's modules, empty where there is none or it can't be told.

    transformers: all outside `base_model_prefix`. timm: `get_classifier()`. Others: the last layer in the order of
    `calls`, and without it as registered, if it is linear; else the last linear layer of the model and what follows it.
    """
    if isinstance(prefix := getattr(model, "base_model_prefix", None), str) and hasattr(model, "config"):
        base = getattr(model, prefix, None) if prefix else None
        if not isinstance(base, nn.Module):
            # CLIP and HGNet-V2 name no base inside their classifiers; a bare base model has no head
            return _classifier(model) or (_last_linear(model, calls) if "For" in type(model).__name__ else ())
        outside = tuple(name for name, child in children_of(model) if child is not base)
        if any(has_params(model.get_submodule(name)) for name in outside):
            return outside
        return _classifier(base, prefix)  # a timm model wrapped by transformers keeps its head inside
    return _classifier(model) or _last_linear(model, calls)


def _classifier(model: nn.Module, prefix: str = "") -> tuple[str, ...]:
    """Paths of what a timm model says its classifier is (some have two, such as distilled DeiT)."""
    if not callable(get_classifier := getattr(model, "get_classifier", None)):
        return ()
    try:
        signature(get_classifier).bind()
    except TypeError:  # takes arguments: a method of the user's own, for something else
        return ()
    found = get_classifier()
    wanted = [id(m) for m in (found if isinstance(found, (tuple, list)) else [found]) if isinstance(m, nn.Module)]
    paths = [path for path, m in model.named_modules() if id(m) in wanted and has_params(m)]
    return tuple(join(prefix, path) for path in paths)


def _last_linear(model: nn.Module, calls: Calls | None) -> tuple[str, ...]:
    leaves = [(path, m) for path, m in _in_order("", model, calls) if path and m._parameters and not children_of(m)]
    if not leaves:
        return ()
    path, leaf = leaves[-1]
    if isinstance(leaf, nn.Linear) or (isinstance(leaf, CONVOLUTIONS) and set(leaf.kernel_size) == {1}):
        return () if _in_block(path, model) else (path,)
    for i in reversed(range(len(leaves))):
        path, leaf = leaves[i]
        if _in_block(path, model):
            return ()
        if isinstance(leaf, nn.Linear):
            return tuple(path for path, _ in leaves[i:])
    return ()


def _in_order(path: str, module: nn.Module, calls: Calls | None) -> Iterator[tuple[str, nn.Module]]:
    yield path, module
    for name, child in children_of(module, calls):
        yield from _in_order(join(path, name), child, calls)


def _in_block(path: str, model: nn.Module) -> bool:
    parents = path.split(".")[:-1]
    if isinstance(model, nn.Sequential):
        parents = parents[1:]  # Sequential(features, classifier) numbers its halves; those are no blocks
    return any(re.search(r"\d$", name) for name in parents)
