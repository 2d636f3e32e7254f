"""Tensors of shape, type and storage without data, for passes that only count bytes and operations.

They are torch's FakeTensorMode made fast: it takes some 0.2 ms for each of the thousands of operations of a pass, and
most are repeats. Here it is asked once for each distinct operation that makes new tensors; repeats are made from what
it gave, and views and changes in place run on meta tensors.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch._subclasses import FakeTensor, FakeTensorMode

CPU = torch.device("cpu")
READS_A_VALUE = torch.ops.aten._local_scalar_dense.default


class ShapeTensor(FakeTensor):
    """A CPU tensor to all that looks at it (autocast, and the choice of kernels, go by the device); `meta` has the
    storage, and takes part in operations.

    A FakeTensor by its class alone, since transformers asks for one before it looks at the values of a mask.
    """

    meta: torch.Tensor
    device = torch.Tensor.device

    @staticmethod
    def __new__(cls, meta: torch.Tensor) -> "ShapeTensor":
        made: ShapeTensor = torch.Tensor._make_wrapper_subclass(
            cls, meta.shape, meta.stride(), meta.storage_offset(), dtype=meta.dtype, device=CPU
        )
        made.meta = meta
        return made

    def __init__(self, meta: torch.Tensor) -> None:
        pass

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return run_on_shapes(func, args, kwargs or {})


def storage_of(tensor: torch.Tensor) -> Any:
    """The storage that a tensor shares with its views: that of its meta tensor where it has no data."""
    return tensor.meta.untyped_storage() if isinstance(tensor, ShapeTensor) else tensor.untyped_storage()


def run_on_shapes(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What an operation of torch gives, without data where it takes a tensor without data or makes one of nothing.

    Raises RuntimeError or NotImplementedError where values decide the result.
    """
    wrappers: dict[int, ShapeTensor] = {}
    reals: list[torch.Tensor] = []
    on_meta = [_to_meta(value, wrappers, reals) for value in args]
    named = {name: _to_meta(value, wrappers, reals) for name, value in kwargs.items()}
    if reals and not wrappers:
        return func(*args, **kwargs)  # constants of the model's own code
    if func is READS_A_VALUE:
        raise RuntimeError("the model's own code reads a value of a tensor, and here tensors have none")
    if not _makes_new(func):
        return _to_shapes(func(*on_meta, **named), wrappers)
    key = (func, *map(_form, on_meta), *((name, _form(value)) for name, value in named.items()))
    if key not in _MADE:
        with _asked():
            _MADE[key] = _form(func(*map(_fake, on_meta), **{name: _fake(value) for name, value in named.items()}))
    return _to_shapes(_anew(_MADE[key]), wrappers)


@dataclass(frozen=True)
class _TensorForm:
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


_MADE: dict[Any, Any] = {}
"""The form of what an operation made, by its function and the forms of its arguments."""


def _form(value: Any) -> Any:
    """A value as part of a key: of a tensor what an operation on it depends on, and 1 is not 1.0."""
    if isinstance(value, torch.Tensor):
        return _TensorForm(value.shape, value.stride(), value.dtype)
    if isinstance(value, list | tuple):
        return tuple(_form(item) for item in value)
    return type(value), value


def _anew(form: Any) -> Any:
    """A value of a form, new on the meta device where it is a tensor."""
    if isinstance(form, _TensorForm):
        return torch.empty_strided(form.shape, form.stride, dtype=form.dtype, device="meta")
    if form and isinstance(form[0], type):
        return form[1]
    return tuple(_anew(item) for item in form)


def _fake(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
    if isinstance(value, list | tuple):
        return type(value)([_fake(item) for item in value])
    return value


@cache
def _asked() -> FakeTensorMode:
    return FakeTensorMode()  # not at import: it brings torch's compiler


# None of these is a function within another: one that calls itself is a cycle, and would keep storages alive.
def _to_meta(value: Any, wrappers: dict[int, ShapeTensor], reals: list[torch.Tensor]) -> Any:
    if isinstance(value, ShapeTensor):
        wrappers[id(value.meta)] = value
        return value.meta
    if isinstance(value, torch.Tensor):
        reals.append(value)
        return value.to("meta")
    if isinstance(value, list | tuple):
        return type(value)([_to_meta(item, wrappers, reals) for item in value])
    return value


def _to_shapes(value: Any, wrappers: dict[int, ShapeTensor]) -> Any:
    if isinstance(value, torch.Tensor):
        known = wrappers.get(id(value))  # what an operation changes in place, it returns
        return ShapeTensor(value) if known is None else known
    if isinstance(value, list | tuple):
        return type(value)([_to_shapes(item, wrappers) for item in value])
    return value


@cache
def _makes_new(func: Any) -> bool:
    """True where no result shares memory with an argument."""
    schema = func._schema
    return not any(each.alias_info for each in (*schema.arguments, *schema.returns))
