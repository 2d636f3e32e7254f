"""Where a model can be cut: after the last module that ends before the first trainable one starts, found by tracing.

The tail keeps the model's own forward. The module at the cut is replaced by one that returns the stored activation, and
every frozen module before it by one that does nothing; whatever the forward does in between is then without effect. So
no model family needs code of its own, and `build` proves the result on real rows before it is used.

Where all that follows the cut are modules that take the activation one after the other, the tail calls just these: a
lone head is done in less time than the forward of a BERT takes to look at its arguments.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dist_finetune.cache.trace import Call, Value, single_tensor, trace
from dist_finetune.engine.base import Inputs
from dist_finetune.errors import DistFinetuneError
from dist_finetune.models.dropout import layer_drops
from dist_finetune.models.sources import forward_logits
from dist_finetune.recompute import without_statistics

ACTIVATION = "activation"  # key of the stored activation among the inputs of a text batch
CANNOT_RUN_ALONE = (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError)
"""What a tail may raise whose forward needs more of the model than the activation at the cut."""


class NoCut(DistFinetuneError):
    """The model can't be cut, or the cache not be kept; the message says why. Not an error: the run goes on without."""


class NotWorth(NoCut):
    """Filling the cache and reading it would take longer than it spares."""


@dataclass(frozen=True)
class StandIn:
    """What takes a module's place in the tail: its path, and the form of what it returned for the traced batch."""

    path: str
    shape: tuple[int, ...]
    returns_tuple: bool


@dataclass(frozen=True)
class Cut:
    """A place to cut a model."""

    at: StandIn
    """The module whose output is stored."""
    before: tuple[StandIn, ...]
    """Frozen modules that the tail can do without."""
    dropped: tuple[str, ...]
    """Names of the parameters and buffers that the tail does not hold."""
    reads_first_only: bool = False
    """True where the tail reads nothing of a text's activation but its first position, as heads on [CLS] do. No other
    is stored then: a text of T tokens takes a T-th of the bytes."""

    chain: tuple[str, ...] = ()
    """Paths of the modules that the activation goes through one after the other, from the cut to the logits; empty
    where the model's forward does anything else in between."""

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of a stored row: (T, ...) of the traced batch, (1, ...) where one position is all that is read."""
        shape = self.at.shape[1:]
        return (1, *shape[1:]) if self.reads_first_only else shape

    def read_part(self, activation: torch.Tensor) -> torch.Tensor:
        """What the tail reads of an activation (B, ...)."""
        return activation[:, :1] if self.reads_first_only else activation


def find_cut(model: nn.Module, inputs: Inputs) -> Cut:
    """The cut of a frozen model in training mode (its frozen modules held in eval), traced with a small batch, in the
    precision that it trains in: a cast that changes nothing leaves no trace.

    Raises NoCut where nothing frozen lies below the first trainable module, or no module there returns one tensor.
    """
    modules = dict(model.named_modules())
    with without_statistics([module for module in modules.values() if isinstance(module, _BatchNorm)]):
        calls, logits = trace(model, inputs)
    starts = {call.module: call.started for call in sorted(calls, key=lambda call: -call.started)}
    trainable = [name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad]
    first = min((_first_use(name, starts) for name in trainable), default=0)
    done = [call for call in calls if call.ended < first and _is_fixed(modules[call.module])]
    usable = [call for call in done if single_tensor(call.output) is not None]
    if not any(_has_state(modules[call.module]) for call in done) or not usable:
        raise NoCut("no frozen part lies below the first trainable one")
    at = max(usable, key=lambda call: call.ended)
    if sum(call.module == at.module for call in calls) > 1:
        raise NoCut(f"{at.module} runs more than once in a forward pass")
    late = {call.module for call in calls if call.started > at.ended}
    before = _outermost(
        _stand_in(call)
        for call in usable
        if call.ended < at.ended
        and _has_state(modules[call.module])
        and not _within(call.module, at.module)
        and not any(_within(name, call.module) for name in late)
    )
    gone = (*(stand_in.path for stand_in in before), at.module)
    names = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    dropped = tuple(name for name in names if any(_within(name, path) for path in gone))
    leaves_out = any(modules[path].training for path, _, _ in layer_drops(model))  # other modules at each step
    return Cut(_stand_in(at), before, dropped, chain=() if leaves_out else _chain(calls, at, logits))


def run_prefix(model: nn.Module, cut: Cut, inputs: Inputs) -> torch.Tensor:
    """The activation at the cut, (B, ...), without the rest of the forward pass."""
    found: list[torch.Tensor] = []

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        tensor = single_tensor(output)
        assert tensor is not None
        found.append(tensor)
        raise _Reached

    handle = model.get_submodule(cut.at.path).register_forward_hook(stop)
    try:
        with torch.inference_mode():
            forward_logits(model, inputs)
    except _Reached:
        pass
    finally:
        handle.remove()
    return found[0]


def make_tail(model: nn.Module, cut: Cut) -> Callable[[], None]:
    """Turns a model, in place, into its tail: its inputs then carry the stored activation. Returns what undoes it.

    A dict of inputs holds it under `ACTIVATION` beside what else the model reads (attention mask, token numbers); an
    image model gets it in the place of the image.
    """
    channel = _Channel()
    replaced = {s.path: model.get_submodule(s.path) for s in (*cut.before, cut.at)}
    for stand_in in cut.before:
        model.set_submodule(stand_in.path, _Skip(channel, stand_in))
    model.set_submodule(cut.at.path, _Inject(channel, cut.at))
    handle = model.register_forward_pre_hook(channel.take, with_kwargs=True)
    if cut.chain:
        model.forward = partial(_run_chain, model, cut.chain, channel)

    def undo() -> None:
        handle.remove()
        if cut.chain:
            del model.forward
        for path, module in replaced.items():
            model.set_submodule(path, module)

    return undo


def reads_first_only(model: nn.Module, cut: Cut, inputs: dict[str, torch.Tensor]) -> bool:
    """Whether the logits of a text model depend on the first position of the activation alone. Not-a-number at all
    others would show in them, whatever the weights are. `inputs` hold the activation, (B, T, ...) with T > 1."""
    poisoned = inputs[ACTIVATION].clone()
    poisoned[:, 1:] = float("nan")
    undo = make_tail(model, cut)
    try:
        with torch.inference_mode():
            logits = forward_logits(model, {**inputs, ACTIVATION: poisoned})
    except CANNOT_RUN_ALONE:
        return False  # the tail can't run alone, as will be said where it is compared with the whole model
    finally:
        undo()
    return bool(logits.isfinite().all())


class _Reached(Exception):
    """Ends a forward pass at the cut."""


class _Channel:
    """Carries the stored activation, and the size of a batch, from the model's inputs to the cut."""

    def __init__(self) -> None:
        self.activation = torch.empty(0)
        self.batch: tuple[int, ...] = (1,)
        self._zeros = torch.empty(0)

    def zeros(self, shape: Sequence[int]) -> torch.Tensor:
        """Zeros for any number of skipped modules at once: one buffer, as large as the largest so far."""
        needed, activation = math.prod(shape), self.activation
        if self._zeros.numel() < needed or self._zeros.device != activation.device:
            with torch.inference_mode(False):  # it outlives an evaluation, and may be written to in place
                self._zeros = torch.zeros(needed, dtype=activation.dtype, device=activation.device)
        return self._zeros[:needed].view(shape)

    def take(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if ACTIVATION in kwargs:
            self.activation = kwargs[ACTIVATION]
            if "attention_mask" in kwargs:
                self.batch = tuple(kwargs["attention_mask"].shape)  # (B, T): the model makes its masks from them
            return args, {name: value for name, value in kwargs.items() if name != ACTIVATION}
        self.activation = args[0]
        return args, kwargs


class _Skip(nn.Module):
    """In the place of a frozen module before the cut: zeros of the right shape, whose values nobody reads.

    Image models get a batch of one, so that what lies between skipped modules costs little.
    """

    def __init__(self, channel: _Channel, stand_in: StandIn) -> None:
        super().__init__()
        self._channel, self._stand_in = channel, stand_in

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        batch = self._channel.batch[: len(self._stand_in.shape) - 1]
        if self._stand_in.shape[1:2] == (1,):  # of every text one position
            batch = batch[:1]
        zeros = self._channel.zeros((*batch, *self._stand_in.shape[len(batch) :]))
        return (zeros,) if self._stand_in.returns_tuple else zeros


class _Inject(nn.Module):
    """In the place of the module at the cut: returns the stored activation, in the form that it had."""

    def __init__(self, channel: _Channel, stand_in: StandIn) -> None:
        super().__init__()
        self._channel, self._stand_in = channel, stand_in

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return (self._channel.activation,) if self._stand_in.returns_tuple else self._channel.activation


def _run_chain(model: nn.Module, paths: Sequence[str], channel: _Channel, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The forward of a tail that is a chain. Modules are found anew at each call: some are replaced later, as BatchNorm
    by one that is synchronised."""
    value = channel.activation
    for path in paths:
        value = model.get_submodule(path)(value)
    return value


def _chain(calls: Sequence[Call], at: Call, logits: Value | None) -> tuple[str, ...]:
    """The modules called after the cut, outermost ones, where each was given what the one before returned, and nothing
    else, and the last returned the logits; else none."""
    value, ended, paths = at.returned, at.ended, list[str]()
    for call in sorted(calls, key=lambda call: call.started):
        if call.started < ended:
            continue  # before the cut, or within a module of the chain
        if value is None or not value.is_same(call.given) or not isinstance(call.output, torch.Tensor):
            return ()
        value, ended = call.returned, call.ended
        paths.append(call.module)
    return tuple(paths) if value is not None and value.is_same(logits) else ()


def _first_use(parameter: str, starts: Mapping[str, int]) -> int:
    """When the innermost module around a parameter that is called starts first; 0 where only the model itself is. Not
    all that own parameters are called: attention hands those of its `out_proj` to a function."""
    owner = parameter.rpartition(".")[0]
    while owner and owner not in starts:
        owner = owner.rpartition(".")[0]
    return starts.get(owner, 0)


def _is_fixed(module: nn.Module) -> bool:
    """True where a module gives the same output in every epoch: frozen, in eval mode, or without state and chance."""
    if any(p.requires_grad for p in module.parameters()):
        return False
    return all(not part.training or not (_has_chance(part) or _has_state(part)) for part in module.modules())


def _has_chance(module: nn.Module) -> bool:
    is_dropout = "drop" in type(module).__name__.lower()
    return is_dropout or any("drop" in name and isinstance(v, float) and v > 0 for name, v in vars(module).items())


def _has_state(module: nn.Module) -> bool:
    return any(True for _ in module.parameters()) or any(True for _ in module.buffers())


def _stand_in(call: Call) -> StandIn:
    tensor = single_tensor(call.output)
    assert tensor is not None
    return StandIn(call.module, tuple(tensor.shape), isinstance(call.output, tuple))


def _outermost(stand_ins: Iterable[StandIn]) -> tuple[StandIn, ...]:
    """Those whose paths lie within no other's, in order, each once."""
    unique = list({s.path: s for s in stand_ins}.values())
    return tuple(s for s in unique if not any(s is not o and _within(s.path, o.path) for o in unique))


def _within(path: str, parent: str) -> bool:
    return path == parent or path.startswith(f"{parent}.")
