"""One dropout probability for a whole model, whichever library built it and wherever it hides the number."""

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

# Parts of names under which libraries keep the probability of skipping a whole block or path.
PATH_WORDS = ("path", "depth", "layerdrop", "layer_drop", "connect", "token_drop")


def set_config_dropout(config: Any, dropout: float) -> None:
    """Sets every dropout probability of a transformers config (and its nested configs) in place.

    Rates of stochastic depth and layer drop become 0 with `dropout` 0.0 and are otherwise left: they say how often a
    block is skipped, which no dropout probability replaces.
    """
    for name, value in list(vars(config).items()):
        if hasattr(value, "to_diff_dict"):
            set_config_dropout(value, dropout)
        elif _is_dropout_name(name) and (_is_number(value) or (value is None and name.endswith("dropout"))):
            if _is_path_name(name):
                setattr(config, name, 0.0 if dropout == 0 else value)
            else:
                setattr(config, name, dropout)


def set_dropout(model: nn.Module, dropout: float) -> None:
    """Sets the probability of every dropout in `model` in place; with 0.0 a forward in train mode is deterministic.

    Covers dropout modules, numbers that functional dropout reads (attention, classifiers), and, where `dropout` is 0.0,
    stochastic depth, which is left as it is otherwise.
    """
    for module in model.modules():
        kind = type(module).__name__.lower()
        skips_paths = _is_path_name(kind) or "stochastic" in kind
        if isinstance(module, _DropoutNd) or (skips_paths and hasattr(module, "p")):
            _set(module, "p", dropout, skips_paths)
        for name, value in list(vars(module).items()):
            if _is_dropout_name(name) and _is_number(value):
                _set(module, name, dropout, skips_paths or _is_path_name(name))


def has_dropout(model: nn.Module, dropout: float) -> bool:
    """Whether a model, or the config that it reads, has a dropout of this probability; skipped paths are none."""
    owners = [*model.modules(), *(module.config for module in model.modules() if hasattr(module, "config"))]
    return any(
        (isinstance(owner, _DropoutNd) and owner.p == dropout)
        or any(
            _is_dropout_name(name) and not _is_path_name(name) and _is_number(value) and value == dropout
            for name, value in getattr(owner, "__dict__", {}).items()
        )
        for owner in owners
    )


def layer_drops(model: nn.Module) -> Iterator[tuple[str, str, float]]:
    """Path, attribute and rate of each module that leaves out some of its layers at random while it trains
    (LayerDrop, Fan et al. 2020). Stochastic depth is none: it multiplies, so that every parameter has its gradient."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name.replace("_", "").lower().endswith("layerdrop") and _is_number(value) and value > 0:
                yield path, name, value


def _set(module: nn.Module, name: str, dropout: float, skips_paths: bool) -> None:
    if not skips_paths:
        setattr(module, name, dropout)
    elif dropout == 0:
        setattr(module, name, 0.0)


def _is_dropout_name(name: str) -> bool:
    return "drop" in name.lower()


def _is_path_name(name: str) -> bool:
    return any(word in name.lower() for word in PATH_WORDS)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
