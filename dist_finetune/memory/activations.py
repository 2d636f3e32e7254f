"""What forward and backward keep alive, and what they compute, found by running them on tensors without data.

These have shapes, types and storages: the pass costs neither memory nor weights. Checked against real runs on the CPU
(benchmarks/plan_exactness.py). For a GPU, dropout and attention are those of its fused kernels; what its libraries take
besides is left to the headroom of `choice`.
"""

import contextlib
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop

from dist_finetune.freeze import Manifest, train_mode
from dist_finetune.memory.shapes import ShapeTensor, run_on_shapes, storage_of
from dist_finetune.models.card import ModelCard
from dist_finetune.models.sources import forward_logits
from dist_finetune.models.structure import Part
from dist_finetune.recompute import called_modules, recomputed
from dist_finetune.tasks.names import TaskName
from dist_finetune.tasks.task import task_of

aten = torch.ops.aten
Run = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
Table = dict[Callable[..., Any], Callable[..., Any]]
Kernels = Callable[[], contextlib.AbstractContextManager[Any]]
"""Within what it gives, operations run as those of a device or an engine."""
LEAST_TELLING_ROWS = 31
FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: lambda *args, out_val=None, **_: sdpa_flop(
        *(a.shape for a in args[:3])
    ),
}


@dataclass(frozen=True)
class Activations:
    """Bytes for a micro-batch: the most of some lines, each a number of bytes and a number more for every row."""

    lines: tuple[tuple[int, int], ...]

    def at(self, rows: int) -> int:
        """Bytes at so many rows."""
        return max(fixed + per_row * rows for fixed, per_row in self.lines)


@dataclass(frozen=True)
class Pass:
    """Forward and backward of a micro-batch in training mode. Bytes leave out parameters and their gradients."""

    micro_batch_size: int
    saved: Activations
    """Kept for the backward pass: unique storages that autograd saves."""
    peak: Activations
    """Most alive at once, results in the making included; at another number of rows it may be at another moment."""
    flops_by_part: dict[str, int]
    """Operations of the forward pass by `Part.label`, "" for what no part runs; a multiply-add is two."""
    input_elements: dict[str, int]
    """Elements of what enters each part of the model, by `Part.label`; only of parts that are given a tensor."""

    @property
    def saved_bytes(self) -> int:
        return self.saved.at(self.micro_batch_size)

    @property
    def peak_bytes(self) -> int:
        return self.peak.at(self.micro_batch_size)

    @property
    def forward_flops(self) -> int:
        return sum(self.flops_by_part.values())


def run_as_is(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs an operation."""
    return func(*args, **kwargs)


class Alive(TorchDispatchMode):
    """Counts the bytes of every tensor that an operation makes while it lives, and the operations. Storages in `known`
    are not counted. A storage of a multiple of `rows` bytes counts as one that grows with the rows. `run` runs an
    operation."""

    def __init__(self, known: set[int], rows: int = 1, run: Run = run_as_is) -> None:
        super().__init__()
        self.rows, self._run = rows, run
        self.fixed = self.per_row = 0
        self.highest: list[tuple[int, int]] = [(0, 0)]
        """(fixed, per row) at the moments of which none held more of both."""
        self.flops_by_part: dict[str, int] = {}
        self.part = ""
        self.input_elements: dict[str, int] = {}
        self._counted = set(known)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else each operation goes through a guard of torch's compiler, which has no part in this

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = self._run(func, args, kwargs)
        for leaf in (out,) if isinstance(out, torch.Tensor) else tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._count(storage_of(leaf))
        flops = FLOPS.get(func.overloadpacket)
        if flops is not None:
            made = flops(*args, **kwargs, out_val=out)
            self.flops_by_part[self.part] = self.flops_by_part.get(self.part, 0) + int(made)
        return out

    def _count(self, storage: Any) -> None:
        key = storage._cdata
        if key not in self._counted:
            self._counted.add(key)
            fixed, per_row = _by_rows(storage.nbytes(), self.rows)
            self.fixed += fixed
            self.per_row += per_row
            if not any(f >= self.fixed and p >= self.per_row for f, p in self.highest):
                self.highest = [(f, p) for f, p in self.highest if f > self.fixed or p > self.per_row]
                self.highest.append((self.fixed, self.per_row))
            weakref.finalize(storage, self._forget, key, fixed, per_row)

    def _forget(self, key: int, fixed: int, per_row: int) -> None:
        self._counted.discard(key)
        self.fixed -= fixed
        self.per_row -= per_row

    @property
    def peak(self) -> Activations:
        """Most bytes alive at once."""
        return Activations(tuple(self.highest))


def _by_rows(num_bytes: int, rows: int) -> tuple[int, int]:
    """Bytes of a storage as (fixed, for each row)."""
    return (num_bytes, 0) if num_bytes % rows else (0, num_bytes // rows)


class InPlaceOf(TorchFunctionMode):
    """Runs other functions in place of those that a table has."""

    def __init__(self, table: Table) -> None:
        super().__init__()
        self._table = table

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self._table.get(func, func)(*args, **(kwargs or {}))


def _stage3_linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    if weight.requires_grad:
        return functional.linear(input, weight, bias)
    made: torch.Tensor = _KeepsInput.apply(input, weight, bias)
    return made


class _KeepsInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(input, weight)
        ctx.autocast = torch.is_autocast_enabled("cpu")
        return functional.linear(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, None, torch.Tensor | None]:
        (grad,) = grad_outputs
        _, weight = ctx.saved_tensors
        for_input, _, for_bias = ctx.needs_input_grad
        with torch.autocast("cpu", torch.bfloat16, enabled=ctx.autocast):
            grad_input = grad.matmul(weight) if for_input else None
        return grad_input, None, grad.flatten(0, -2).sum(0) if for_bias else None


def _gpu_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **more: Any,
) -> torch.Tensor:
    return functional.scaled_dot_product_attention(query, key, value, attn_mask, 0.0, is_causal, **more)


def _gpu_dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    return torch.native_dropout(input, p, training)[0] if training and p > 0 else input


FUSED_ON_GPU: Table = {functional.scaled_dot_product_attention: _gpu_attention, functional.dropout: _gpu_dropout}
"""What a GPU has one kernel for, as such a kernel would save it: dropout keeps a mask of bools, and attention neither
its probabilities nor its dropout. On the CPU both keep whole fp32 tensors."""
LINEARS_OF_STAGE3: Table = {functional.linear: _stage3_linear}
"""Linear layers of frozen weights as stage 3 of DeepSpeed runs them (deepspeed.runtime.zero.linear): each keeps its
input for the backward pass, though no weight gets a gradient of it."""


def fake_pass(
    model: nn.Module,
    manifest: Manifest,
    parts: tuple[Part, ...],
    inputs: Callable[[int], Any],
    micro_batch_size: int,
    autocast: bool,
    device: Literal["cpu", "cuda"] = "cpu",
    recompute: Sequence[Part] = (),
    in_bf16: Collection[str] = (),
    task: TaskName = "classification",
    stage3: bool = False,
) -> Pass | str:
    """The pass of a model on the meta device, frozen as `manifest` says, or why it can't be run without data.

    `inputs` makes the inputs of so many rows (from a pass of `telling_rows` the bytes of any number follow), the blocks
    `recompute` run under gradient checkpointing, the parameters `in_bf16` are kept in bf16, and linear layers run as
    `LINEARS_OF_STAGE3` says where `stage3`. The model's tensors are `ShapeTensor`s within, and its own again after.
    """
    table: Table = {**(FUSED_ON_GPU if device == "cuda" else {}), **(LINEARS_OF_STAGE3 if stage3 else {})}
    kernels = partial(InPlaceOf, table) if table else contextlib.nullcontext
    try:
        with _without_data(model, in_bf16), _recomputing(model, recompute, kernels):
            frozen = set(manifest.frozen)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name not in frozen)
            train_mode(model, manifest)
            with kernels():
                return measured_pass(model, parts, inputs, micro_batch_size, autocast, task, run_on_shapes)
    except Exception as error:  # a user's model may do anything, and the rest of the plan stands without this
        return f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"


def measured_pass(
    model: nn.Module,
    parts: tuple[Part, ...],
    inputs: Callable[[int], Any],
    micro_batch_size: int,
    autocast: bool,
    task: TaskName = "classification",
    run: Run = run_as_is,
) -> Pass:
    """A forward and backward pass of `model` as it is, each operation by `run`; its gradients are not kept."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    known = {storage_of(t)._cdata for t in (*model.parameters(), *model.buffers())}
    saved: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = storage_of(tensor)
        if storage._cdata not in known:
            saved[storage._cdata] = storage
        return tensor

    alive = Alive(known, micro_batch_size, run)
    with contextlib.ExitStack() as stack:
        for parameter in parameters:
            stack.callback(parameter.register_post_accumulate_grad_hook(drop_gradient).remove)
        stack.enter_context(alive)
        batch = inputs(micro_batch_size)
        with (
            _attributed(model, parts, alive),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        ):
            logits = forward_logits(model, batch)
        logits = logits.float()
        loss = task_of(task).loss(logits, task_of(task).blank(logits))
        sizes = [_by_rows(storage.nbytes(), micro_batch_size) for storage in saved.values()]
        saved_line = (sum(fixed for fixed, _ in sizes), sum(per_row for _, per_row in sizes))
        saved.clear()
        forward_flops = dict(alive.flops_by_part)
        loss.backward()
    return Pass(micro_batch_size, Activations((saved_line,)), alive.peak, forward_flops, alive.input_elements)


def telling_rows(model: nn.Module, inputs: Callable[[int], Any]) -> int:
    """The micro-batch of a pass that tells what any micro-batch takes: a prime that divides no dimension of the model's
    tensors and of a row, so that bytes are a multiple of it where they grow with the rows, and nowhere else."""
    row = [leaf for leaf in tree_leaves(inputs(1)) if isinstance(leaf, torch.Tensor)]
    sizes = {size for tensor in (*model.parameters(), *model.buffers(), *row) for size in tensor.shape if size}
    numbers = (n for n in count(LEAST_TELLING_ROWS) if all(n % d for d in range(2, int(n**0.5) + 1)))
    return next(n for n in numbers if all(size % n for size in sizes))


def fake_inputs(card: ModelCard, max_length: int | None, image_size: tuple[int, int] | None) -> Callable[[int], Any]:
    """Inputs as the loaders make them, at their largest: ids and mask (B, T), or pixels (B, 3, H, W)."""
    if card.modality == "text":
        assert max_length is not None
        return lambda rows: {
            "input_ids": torch.zeros(rows, max_length, dtype=torch.int64),
            "attention_mask": torch.ones(rows, max_length, dtype=torch.int64),
        }
    assert image_size is not None
    return lambda rows: torch.zeros(rows, 3, *image_size)


def drop_gradient(parameter: torch.Tensor) -> None:
    """Lets go of a gradient as soon as it is there."""
    parameter.grad = None


@contextlib.contextmanager
def _attributed(model: nn.Module, parts: tuple[Part, ...], alive: Alive) -> Iterator[None]:
    """Within it, operations count for the part whose module runs."""
    hooks = []
    for part in parts:
        for path in part.modules:
            module = model.get_submodule(path)
            hooks.append(module.register_forward_pre_hook(_Enter(alive, part.label)))
            hooks.append(module.register_forward_hook(_Enter(alive, "")))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class _Enter:
    alive: Alive
    label: str

    def __call__(self, module: nn.Module, args: Any, *_: Any) -> None:
        self.alive.part = self.label
        if args and isinstance(args[0], torch.Tensor) and args[0].is_floating_point():
            self.alive.input_elements.setdefault(self.label, args[0].numel())


def _run_by(kernels: Kernels, forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with kernels():
            return forward(*args, **kwargs)

    return run


@contextlib.contextmanager
def _recomputing(model: nn.Module, blocks: Sequence[Part], kernels: Kernels) -> Iterator[None]:
    """Within it, the blocks keep no activations. Random numbers are not replayed: there are none."""
    changed = [module for block in blocks for module in called_modules(model, block)]
    for module in changed:
        # the backward pass runs outside of a mode, and what it recomputes has to be as before
        module.forward = recomputed(_run_by(kernels, module.forward), keep_random_state=False)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


@contextlib.contextmanager
def _without_data(model: nn.Module, in_bf16: Collection[str]) -> Iterator[None]:
    """Within it, every tensor of a meta model is a `ShapeTensor`; tied ones stay tied."""
    low = {id(parameter) for name, parameter in model.named_parameters() if name in in_bf16}
    places: list[tuple[dict[str, Any], str, Any]] = []
    shapes: dict[int, torch.Tensor] = {}
    for module in model.modules():
        stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in stores:
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in shapes:
                    meta = tensor.detach().to("meta", torch.bfloat16 if id(tensor) in low else tensor.dtype)
                    shape = ShapeTensor(meta)
                    shapes[id(tensor)] = nn.Parameter(shape, False) if isinstance(tensor, nn.Parameter) else shape
                places.append((tensors, name, tensor))
    for tensors, name, tensor in places:
        tensors[name] = shapes[id(tensor)]
    try:
        yield
    finally:
        for tensors, name, tensor in places:
            tensors[name] = tensor
