"""What a forward pass calls, in which order, and what each module is given and returns."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dist_finetune.engine.base import Inputs
from dist_finetune.models.sources import forward_logits


@dataclass(frozen=True)
class Value:
    """A tensor at a moment: the same one, not written to since, has the same version."""

    tensor: torch.Tensor
    version: int

    def is_same(self, other: "Value | None") -> bool:
        """Whether nothing was made or written to between the two."""
        return other is not None and self.tensor is other.tensor and self.version == other.version


@dataclass(frozen=True)
class Call:
    """One call of a module, by its path, with when it started and ended in the order of all such moments."""

    module: str
    started: int
    ended: int
    given: Value | None
    """The one thing that the module was called with, where it is a tensor."""
    output: Any
    returned: Value | None
    """Its output, where that is a tensor, as it was when the call ended."""


def trace(model: nn.Module, inputs: Inputs) -> tuple[list[Call], Value | None]:
    """Every module call of one forward pass, with the order of starts and ends; and the logits."""
    events, open_calls = 0, dict[str, list[tuple[int, Value | None]]]()
    calls: list[Call] = []
    handles = []

    def tick() -> int:
        nonlocal events
        events += 1
        return events

    def enter(name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            only = args[0] if len(args) == 1 and not kwargs else None
            open_calls.setdefault(name, []).append((tick(), _value(only)))

        return note

    def leave(name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            started, given = open_calls[name].pop()
            calls.append(Call(name, started, tick(), given, output, _value(single_tensor(output))))

        return note

    for name, module in model.named_modules():
        if name:
            handles.append(module.register_forward_pre_hook(enter(name), with_kwargs=True))
            handles.append(module.register_forward_hook(leave(name)))
    try:
        with torch.no_grad():
            logits = forward_logits(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return calls, _value(logits)


def single_tensor(output: Any) -> torch.Tensor | None:
    """The one floating tensor that a module returned, alone or in a tuple; None for anything else."""
    if isinstance(output, tuple) and type(output) is tuple and len(output) == 1:
        output = output[0]
    return output if isinstance(output, torch.Tensor) and output.is_floating_point() else None


def _value(thing: Any) -> Value | None:
    """None also for a tensor of `torch.inference_mode`, which counts no versions."""
    return Value(thing, thing._version) if isinstance(thing, torch.Tensor) and not thing.is_inference() else None
