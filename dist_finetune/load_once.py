"""A model that is in host memory once a node: one process reads it, the others map what that process wrote.

The reading process writes every tensor to a file of its own in a private temporary folder, which is gone as soon as
every process of the node has mapped the files. Mapped privately, a page stays one page of memory for all processes
until one of them writes to it. A file for each tensor, so that sharding frees whole tensors one by one.
"""

import contextlib
import socket
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dist_finetune.models.card import Provenance
from dist_finetune.models.on_meta import on_meta
from dist_finetune.world import World, gather_objects, patience, together

Loaded = tuple[nn.Module, Provenance]


class NotShared(Exception):
    """The model can't be shared, and each process loads it by itself; the message says why."""


@dataclass(frozen=True)
class _Written:
    """What the processes of a node must know to map the tensors that one of them wrote; file N holds tensor N."""

    node: str
    folder: Path
    provenance: Provenance
    tensors: tuple[tuple[torch.dtype, torch.Size, bool], ...]
    """Type, shape, and whether it is a parameter that requires a gradient."""
    names: dict[str, int]
    """Tensor by name of each parameter and buffer; those that are tied have the same one."""


def load_once_a_node(
    load: Callable[[], Loaded], build: Callable[[], nn.Module], world: World
) -> tuple[nn.Module, Provenance, str | None]:
    """What `load` returns, the same on every rank, and why ranks had to load by themselves, if they had. Collective.

    `load` runs on one rank of each node; the others call `build` for the same model on the meta device and give it the
    tensors of that rank. Raises on every rank the DistFinetuneError of the lowest rank that failed.
    """
    reads = world.local_rank == 0
    with patience(), ExitStack() as until_mapped:
        own = together(lambda: load() if reads else None)
        problem: str | None = None
        written = None
        try:
            if own and world.local_world_size > 1:
                written = _write(*own, until_mapped)
        except NotShared as error:
            problem = str(error)
        everywhere = gather_objects(written)

        def finish() -> Loaded:
            nonlocal problem
            if own:
                return own
            try:
                return _map(build, [w for w in everywhere if w and w.node == socket.gethostname()])
            except (OSError, RuntimeError, NotShared) as error:  # torch has RuntimeError for a file that isn't there
                problem = str(error)
                return load()

        model, provenance = together(finish)
        problems = gather_objects(problem)
    return model, provenance, next((p for p in problems if p), None)


def change_once_a_node(model: nn.Module, change: Callable[[], Iterable[str]], world: World) -> None:
    """Runs `change`, which gives parameters and buffers of `model` other values in place and returns their names, on
    one rank of each node; the others share what came of it. Collective.

    Raises on every rank the DistFinetuneError of the lowest rank that failed.
    """
    changes = world.local_rank == 0
    with patience(), ExitStack() as until_mapped:
        names = together(lambda: tuple(change()) if changes else ())
        folder: Path | None = None
        if changes and world.local_world_size > 1:
            with contextlib.suppress(NotShared):
                _refuse_unusual(model)
                folder = _write_tensors([_named(model)[name] for name in names], until_mapped)
        here = socket.gethostname()
        offers = {node: (made, known) for node, made, known in gather_objects((here, folder, names)) if made}

        def take() -> None:
            if here not in offers:
                change()
                return
            made, known = offers[here]
            tensors = [_named(model)[name] for name in known]
            try:
                mapped = [_mapped(made / str(i), tensor.dtype, tensor.shape) for i, tensor in enumerate(tensors)]
            except (OSError, RuntimeError):  # containers of one host name may each have temporary files of their own
                change()
                return
            for tensor, data in zip(tensors, mapped, strict=True):
                tensor.data = data

        together(lambda: None if changes else take())


def _write(model: nn.Module, provenance: Provenance, until_mapped: ExitStack) -> _Written:
    """Writes the tensors of `model` to a folder that `until_mapped` removes, and puts mapped ones in their place.

    Raises NotShared where they can't be written, or files would not give the same model.
    """
    _refuse_unusual(model)
    names = _named(model)
    unique = list({id(tensor): tensor for tensor in names.values()}.values())
    number = {id(tensor): index for index, tensor in enumerate(unique)}
    return _Written(
        socket.gethostname(),
        _write_tensors(unique, until_mapped),
        provenance,
        tuple((t.dtype, t.shape, t.requires_grad) for t in unique),
        {name: number[id(tensor)] for name, tensor in names.items()},
    )


def _write_tensors(tensors: Sequence[Tensor], until_mapped: ExitStack) -> Path:
    """A folder, which `until_mapped` removes, with a file for each tensor; mapped ones take their place."""
    try:
        folder = Path(until_mapped.enter_context(tempfile.TemporaryDirectory(prefix="dist-finetune-")))
        for index, tensor in enumerate(tensors):
            file = folder / str(index)
            file.write_bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            tensor.data = _mapped(file, tensor.dtype, tensor.shape)  # its own memory is free before the next is written
    except OSError as error:
        raise NotShared(f"the folder for temporary files can't take it ({error}); TMPDIR names another") from None
    return folder


def _refuse_unusual(model: nn.Module) -> None:
    """Raises NotShared where a model's state is not a set of plain tensors with memory of their own."""
    names = _named(model)
    if hidden := set(model.state_dict()) - set(names):
        raise NotShared(f"{min(hidden)} is neither a parameter nor a buffer")
    storages: set[int] = set()
    for name, tensor in {id(t): (n, t) for n, t in names.items()}.values():
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
        dense = tensor.is_contiguous() or not isinstance(tensor, nn.Parameter)
        if not plain or not dense or tensor.device.type != "cpu":
            raise NotShared(f"{name} is not a plain tensor on the CPU")
        storage = tensor.untyped_storage().data_ptr()
        if storage in storages and tensor.numel():
            raise NotShared(f"{name} shares memory with another tensor")
        storages.add(storage)


def _map(build: Callable[[], nn.Module], offers: list[_Written]) -> Loaded:
    """The model that another process of this node wrote. Raises NotShared where it can't be put together here."""
    if not offers:
        raise NotShared("no process of this node could share it")
    (written, *_) = offers
    tensors: list[Tensor] = []
    for index, (dtype, shape, requires_grad) in enumerate(written.tensors):
        tensors.append(_mapped(written.folder / str(index), dtype, shape).requires_grad_(requires_grad))
    with on_meta():
        model = build().train()
    if set(_named(model)) != set(written.names):
        raise NotShared("the model has other tensors when it is built without weights")
    parameters: dict[int, nn.Parameter] = {}
    for name, index in written.names.items():
        path, _, own = name.rpartition(".")
        module, tensor = model.get_submodule(path), tensors[index]
        if own in module._parameters:
            parameter = nn.Parameter(tensor.detach(), tensor.requires_grad)
            module._parameters[own] = parameters.setdefault(index, parameter)
        else:
            module._buffers[own] = tensor
    for path, module in model.named_modules():
        if any(tensor.is_meta for tensor in _tensors_in(list(vars(module).values()))):
            raise NotShared(f"{path or type(model).__name__} has tensors that are neither parameters nor buffers")
    return model, written.provenance


def _named(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by name; one that is tied under each of its names."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def _mapped(file: Path, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    """The tensor in a file, whose pages are copied when they are written to."""
    num_bytes = file.stat().st_size
    if not num_bytes:
        return torch.empty(shape, dtype=dtype)
    return torch.from_file(str(file), shared=False, size=num_bytes, dtype=torch.uint8).view(dtype).view(shape)


def _tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for item in value for t in _tensors_in(item)] if isinstance(value, list | tuple) else []
