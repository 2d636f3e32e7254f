"""Models on the meta device: names, shapes and modules, without memory and the time that starting values take."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

FILLS = {"uniform_", "normal_", "erfinv_", "mul_", "add_", "clamp_", "zero_", "fill_", "copy_", "trunc_normal_"}


class _NoValues(TorchFunctionMode):
    """Leaves out what only fills tensors: on the meta device that changes nothing, and takes most of the time."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in FILLS and args and isinstance(args[0], torch.Tensor) and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def on_meta() -> Iterator[None]:
    """Within it, models are built on the meta device."""
    with torch.device("meta"), _NoValues():
        yield
