"""Finds the head of a model: the freshly initialised modules that turn features into logits."""

import re

from torch import nn

from dist_finetune.models.blocks import CONVOLUTIONS, children_of, has_params, join


def find_head(model: nn.Module) -> tuple[str, ...]:
    """Dotted paths of the head's modules, empty where there is none or it can't be told.

    transformers: all outside `base_model_prefix`. timm: `get_classifier()`. Others: the last layer, if it is linear.
    """
    if isinstance(prefix := getattr(model, "base_model_prefix", None), str) and hasattr(model, "config"):
        base = getattr(model, prefix, None) if prefix else None
        if not isinstance(base, nn.Module):
            return _classifier(model)  # the bare base model
        outside = tuple(name for name, child in children_of(model) if child is not base)
        if any(has_params(model.get_submodule(name)) for name in outside):
            return outside
        return _classifier(base, prefix)  # a timm model wrapped by transformers keeps its head inside
    return _classifier(model) or _last_linear(model)


def _classifier(model: nn.Module, prefix: str = "") -> tuple[str, ...]:
    """Paths of what a timm model says its classifier is (some have two, such as distilled DeiT)."""
    if not callable(get_classifier := getattr(model, "get_classifier", None)):
        return ()
    found = get_classifier()
    wanted = [id(m) for m in (found if isinstance(found, (tuple, list)) else [found]) if isinstance(m, nn.Module)]
    paths = [path for path, m in model.named_modules() if id(m) in wanted and has_params(m)]
    return tuple(join(prefix, path) for path in paths)


def _last_linear(model: nn.Module) -> tuple[str, ...]:
    leaves = [(path, m) for path, m in model.named_modules() if path and m._parameters and not children_of(m)]
    if not leaves:
        return ()
    path, leaf = leaves[-1]
    is_linear = isinstance(leaf, nn.Linear) or (isinstance(leaf, CONVOLUTIONS) and set(leaf.kernel_size) == {1})
    parents = path.split(".")[:-1]
    if isinstance(model, nn.Sequential):
        parents = parents[1:]  # Sequential(features, classifier) numbers its halves; those are no blocks
    inside_block = any(re.search(r"\d$", name) for name in parents)
    return (path,) if is_linear and not inside_block else ()
