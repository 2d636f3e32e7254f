"""Plain data parallelism: every rank holds the whole model and its own copy of the optimizer state."""

import contextlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from dist_finetune.engine.base import MOMENTS, Fragment, Held, Inputs, adam_state, collect
from dist_finetune.engine.precision import LossScale, autocast_of
from dist_finetune.models.sources import forward_logits
from dist_finetune.plan import Plan


class DdpEngine:
    """DistributedDataParallel; only gradients of trainable parameters are reduced, once a step."""

    is_partitioned = False

    def __init__(self, wrapped: nn.Module, module: nn.Module, optimizer: Any, plan: Plan, accelerator: Any) -> None:
        self.module = module
        self._wrapped, self._optimizer, self._accelerator = wrapped, optimizer.optimizer, accelerator
        self._max_grad_norm = plan.spec.train.max_grad_norm
        self._autocast, self.loss_scale = autocast_of(plan), LossScale(plan)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = self._optimizer.param_groups
        return groups

    def forward(self, inputs: Inputs, is_last: bool) -> torch.Tensor:
        with self._synchronised(is_last), self._autocast():
            return forward_logits(self._wrapped, inputs).float()

    def backward(self, loss: torch.Tensor, is_last: bool) -> None:
        with self._synchronised(is_last):
            self.loss_scale.apply(loss).backward()

    def step(self) -> torch.Tensor | float:
        gradients = [p.grad for p in self._parameters() if p.grad is not None]
        self.loss_scale.unscale(gradients)
        norm = torch.nn.utils.get_total_norm(gradients)
        if self._max_grad_norm:  # without a limit nothing is multiplied, not even by 1
            torch.nn.utils.clip_grads_with_norm_(self._parameters(), self._max_grad_norm, norm)
        if self.loss_scale.allows_step(norm):
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def predict(self, inputs: Inputs) -> torch.Tensor:
        with torch.inference_mode(), self._autocast():
            return forward_logits(self.module, inputs).float()

    def gathered(self, tensor: torch.Tensor) -> AbstractContextManager[torch.Tensor]:
        return contextlib.nullcontext(tensor)

    def held(self) -> Held:
        numels = sum(p.numel() for p in self._parameters())
        return Held(self._parameters(), numels, numels, 0)

    def fragments(self) -> Iterator[Fragment]:
        names = {id(p): name for name, p in self.module.named_parameters()}
        for parameter in self._parameters():
            state = adam_state(self._optimizer, parameter)
            moments = {kind: state[kind].view(-1) for kind in MOMENTS}
            yield Fragment(names[id(parameter)], 0, parameter.detach().view(-1), moments)

    def adam_steps(self) -> dict[str, int]:
        names = {id(p): name for name, p in self.module.named_parameters()}
        return {names[id(p)]: int(adam_state(self._optimizer, p)["step"]) for p in self._parameters()}

    def set_adam_steps(self, steps: Mapping[str, int]) -> None:
        names = {id(p): name for name, p in self.module.named_parameters()}
        for parameter in self._parameters():
            adam_state(self._optimizer, parameter)["step"].fill_(steps[names[id(parameter)]])

    def rehearse(self, inputs: Inputs) -> None:
        """DDP lays its buckets out anew after its first pass, and from three ranks on the layout decides in which order
        their gradients are added: without this, the first step after a resume would round otherwise."""
        self.module.eval()
        self.forward(inputs, is_last=True).sum().backward()
        self._optimizer.zero_grad(set_to_none=True)

    def close(self) -> None:
        self._wrapped = self.module = nn.Module()
        self._optimizer = self._accelerator = None
        collect()

    def _parameters(self) -> list[torch.Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _synchronised(self, is_last: bool) -> AbstractContextManager[Any]:
        """DDP reduces in the backward pass of the last micro-batch only. There is none around the model of one process,
        or of ranks that compute whole steps."""
        if is_last or not isinstance(self._wrapped, nn.parallel.DistributedDataParallel):
            return contextlib.nullcontext()
        return self._wrapped.no_sync()
