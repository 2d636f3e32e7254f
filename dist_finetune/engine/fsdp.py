"""FSDP2: weights, gradients and optimizer state of each block are cut over the ranks, and gathered block by block.

torch's `fully_shard` cuts every parameter along its first dimension, as `torch.chunk` does: the last ranks may get less
or nothing. Frozen parameters may be left out (`shard.frozen: replicate`): they have no gradient to reduce, so a copy on
each rank saves gathering them twice a step.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from dist_finetune.engine.base import MOMENTS, Fragment, Held, Inputs, adam_state, collect
from dist_finetune.engine.precision import LossScale, autocast_of
from dist_finetune.fsdp_layout import block_groups, is_left_out
from dist_finetune.models.sources import forward_logits
from dist_finetune.phases import PhasePlan
from dist_finetune.plan import Plan
from dist_finetune.world import sum_over_ranks


class FsdpEngine:
    """A model under `fully_shard`; gradients are reduced once a step, in the last micro-batch's backward pass."""

    is_partitioned = True

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        plan: Plan,
        phase: PhasePlan,
        device: torch.device,
    ) -> None:
        names = {id(p): name for name, p in module.named_parameters()}
        members = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
        shard_model(module, plan, phase, device)
        shard_optimizer(module, optimizer, members)
        self.module, self._device = module, device
        self._optimizer: Any = optimizer
        self._max_grad_norm = plan.spec.train.max_grad_norm
        self._autocast, self.loss_scale = autocast_of(plan), LossScale(plan)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = self._optimizer.param_groups
        return groups

    def forward(self, inputs: Inputs, is_last: bool) -> torch.Tensor:
        with self._autocast():
            return forward_logits(self.module, inputs).float()

    def backward(self, loss: torch.Tensor, is_last: bool) -> None:
        root = self._root
        root.set_requires_gradient_sync(is_last)
        root.set_is_last_backward(is_last)
        self.loss_scale.apply(loss).backward()

    def step(self) -> torch.Tensor | float:
        norm = self._clip()
        if self.loss_scale.allows_step(norm):
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def predict(self, inputs: Inputs) -> torch.Tensor:
        # gathered weights can't be inference tensors: the next forward pass of training uses them too
        with torch.no_grad(), self._autocast():
            logits = forward_logits(self.module, inputs).float()
        self._root.reshard()  # the root group otherwise waits, whole, for a backward pass
        return logits

    @contextlib.contextmanager
    def gathered(self, tensor: torch.Tensor) -> Iterator[torch.Tensor]:
        if not isinstance(tensor, DTensor):
            yield tensor
            return
        with torch.no_grad():
            yield tensor.to(self._device).full_tensor()  # type: ignore[attr-defined]

    def held(self) -> Held:
        parameters = self._parameters()
        numels = sum(_local(p).numel() for p in parameters)
        return Held(list(parameters), numels, numels, 0)

    def fragments(self) -> Iterator[Fragment]:
        for name, parameter in self._named():
            state, weight = adam_state(self._optimizer, parameter), _local(parameter).view(-1)
            if weight.numel():
                moments = {kind: _local(state[kind]).view(-1) for kind in MOMENTS}
                yield Fragment(name, _offset(parameter), weight, moments)

    def adam_steps(self) -> dict[str, int]:
        return {name: int(adam_state(self._optimizer, p)["step"]) for name, p in self._named()}

    def set_adam_steps(self, steps: Mapping[str, int]) -> None:
        for name, parameter in self._named():
            adam_state(self._optimizer, parameter)["step"].fill_(steps[name])

    def rehearse(self, inputs: Inputs) -> None:
        """Each block is reduced by itself, in the same order at every step, also at the first."""

    def close(self) -> None:
        self.module = nn.Module()
        self._optimizer = None
        collect()

    @property
    def _root(self) -> FSDPModule:
        assert isinstance(self.module, FSDPModule)
        return self.module

    def _parameters(self) -> list[DTensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _named(self) -> Iterator[tuple[str, DTensor]]:
        names = {id(p): name for name, p in self.module.named_parameters()}
        for parameter in self._parameters():
            yield names[id(parameter)], parameter

    def _clip(self) -> torch.Tensor:
        """Scales the gradients down to `max_grad_norm`; returns their norm over all ranks before that."""
        grads = [_local(p.grad) for p in self._parameters() if isinstance(p.grad, DTensor)]
        grads = [g for g in grads if g.numel()]
        self.loss_scale.unscale(grads)
        squares = [torch.linalg.vector_norm(g).square() for g in grads]
        own = torch.stack(squares).sum() if squares else torch.zeros((), device=self._device)
        norm = sum_over_ranks(own.to(self._device)).sqrt()
        if self._max_grad_norm:
            factor = (self._max_grad_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch's clip_grad_norm_ does
            for grad in grads:
                grad.mul_(factor.to(grad.device))
        return norm


def shard_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, names: list[list[str]]) -> None:
    """Points the groups of an optimizer that has not stepped yet to the parameters that took the place of its own."""
    assert not optimizer.state, "sharded too late: the optimizer has state of whole parameters"
    sharded = dict(model.named_parameters())
    for group, members in zip(optimizer.param_groups, names, strict=True):
        group["params"] = [sharded[name] for name in members]


def shard_model(model: nn.Module, plan: Plan, phase: PhasePlan, device: torch.device) -> None:
    """Moves the parameters of `model` to the device and cuts them in place, group by group: one for each block of the
    structure map, the root last."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = OffloadPolicy()
    if plan.spec.shard.offload == "parameters":
        policy = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    records = {record.name: record for record in phase.manifest.records}
    layout = plan.costs.frozen_layout
    left_out = {p for name, p in model.named_parameters() if is_left_out(records[name], layout)}
    modules = dict(model.named_modules())
    containers = {path for path, m in modules.items() if isinstance(m, nn.ModuleList | nn.ModuleDict)}
    for paths in block_groups(plan.structure, containers):
        group = [modules[path] for path in paths if path in modules]
        if any(p not in left_out for m in group for p in m.parameters()):  # a cached prefix has left its blocks empty
            _shard(group, mesh, policy, left_out)
    _shard(model, mesh, policy, left_out)
    for tensor in (*left_out, *model.buffers()):
        tensor.data = tensor.data.to(device)


def _shard(part: nn.Module | list[nn.Module], mesh: DeviceMesh, policy: OffloadPolicy, left_out: set[Any]) -> None:
    # resharded after forward, the root too: between steps every parameter is then a shard, in evaluation as well
    fully_shard(part, mesh=mesh, reshard_after_forward=True, offload_policy=policy, ignored_params=left_out)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's share, without padding; it may be empty."""
    assert isinstance(tensor, DTensor)
    return tensor.to_local().detach()


def _offset(parameter: DTensor) -> int:
    """Where this rank's share starts in the flattened parameter."""
    rows = parameter.shape[0]
    rows_per_rank = -(-rows // dist.get_world_size())
    return min(rows, dist.get_rank() * rows_per_rank) * (parameter.numel() // max(1, rows))
