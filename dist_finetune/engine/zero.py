"""DeepSpeed ZeRO stages 1 to 3: optimizer state (1), gradients (2) and weights (3) are spread over the ranks.

DeepSpeed keeps what a rank updates in flat fp32 tensors, one a parameter group (stages 1 and 2: an even cut of all
parameters laid end to end) or sub-group (stage 3: an even cut of each parameter). `fragments` names their pieces.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from dist_finetune.engine.base import MOMENTS, Fragment, Held, Inputs, adam_state, collect
from dist_finetune.engine.precision import LossScale
from dist_finetune.models.sources import forward_logits
from dist_finetune.plan import Plan


class ZeroEngine:
    """A DeepSpeed engine driven directly: our loop says where an accumulation window ends."""

    is_partitioned = True

    def __init__(self, engine: Any, module: nn.Module, plan: Plan, accelerator: Any) -> None:
        self.module = module
        self._engine, self._accelerator = engine, accelerator
        self._stage = int(plan.strategy.removeprefix("zero"))
        self._zero = engine.optimizer
        self.loss_scale = LossScale(plan)
        self._is_scaled = plan.precision == "fp16"
        # DeepSpeed's own scaler leaves out a step on the rank whose gradients overflowed, and no other; it also clips
        # before it takes the scale off. A scale that it is given is known to its clipping and to its global norm.
        self._zero.torch_autocast_gradscaler = None

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = self._zero.param_groups
        return groups

    def forward(self, inputs: Inputs, is_last: bool) -> torch.Tensor:
        return forward_logits(self._engine, inputs).float()

    def backward(self, loss: torch.Tensor, is_last: bool) -> None:
        if self._is_scaled:
            self._zero.override_loss_scale(self.loss_scale.scale)
        self._engine.backward(loss, scale_wrt_gas=False)  # the loss is already divided by the global batch's real count

    def step(self) -> torch.Tensor | float:
        self._engine.step()
        norm: torch.Tensor | float = self._engine.get_global_grad_norm()
        if self._is_scaled:
            self.loss_scale.allows_step(torch.as_tensor(norm))  # not finite: DeepSpeed has left out the step
        return norm

    def predict(self, inputs: Inputs) -> torch.Tensor:
        # stage 3 fills and frees weights in forward hooks, which inference tensors would not allow
        with torch.no_grad() if self._stage == 3 else torch.inference_mode():
            return forward_logits(self._engine, inputs).float()

    @contextlib.contextmanager
    def gathered(self, tensor: torch.Tensor) -> Iterator[torch.Tensor]:
        if not hasattr(tensor, "ds_id"):
            yield tensor
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            yield tensor

    def held(self) -> Held:
        zero, world_size = self._zero, dist.get_world_size()
        parameters = [p for group in self._groups() for p in group]
        optimizer = sum(flat.numel() for flat in self._flats())
        if self._stage == 3:
            padding = sum(p.partition_numel() * world_size - p.ds_numel for p in parameters)
            # every rank knows the padding of all ranks: a share of it each keeps the sum over ranks exact
            return Held(parameters, optimizer, zero.grad_partitions_flat_buffer.numel(), padding / world_size)
        inner = sum(sum(padding) for padding in zero.round_robin_bit16_padding) / world_size
        gradients = sum(int(size) for size in zero.partition_size)
        return Held(parameters, optimizer, gradients, sum(zero.groups_padding) + inner)

    def fragments(self) -> Iterator[Fragment]:
        names = {id(p): name for name, p in self.module.named_parameters()}
        for index, (group, flat) in enumerate(zip(self._groups(), self._flats(), strict=True)):
            state = adam_state(self._zero.optimizer, flat)
            for parameter, in_flat, in_parameter, length in self._pieces(index, group):
                span = slice(in_flat, in_flat + length)
                moments = {kind: state[kind][span] for kind in MOMENTS}
                yield Fragment(names[id(parameter)], in_parameter, flat.detach()[span], moments)

    def adam_steps(self) -> dict[str, int]:
        names = {id(p): name for name, p in self.module.named_parameters()}
        return {
            names[id(p)]: int(adam_state(self._zero.optimizer, flat)["step"])
            for group, flat in zip(self._groups(), self._flats(), strict=True)
            for p in group
        }

    def set_adam_steps(self, steps: Mapping[str, int]) -> None:
        names = {id(p): name for name, p in self.module.named_parameters()}
        for group, flat in zip(self._groups(), self._flats(), strict=True):
            counts = {steps[names[id(p)]] for p in group}
            assert len(counts) == 1, f"a group with several step counts: {counts}"
            adam_state(self._zero.optimizer, flat)["step"].fill_(counts.pop())

    def rehearse(self, inputs: Inputs) -> None:
        """Its buckets are filled in the same order at every step, also at the first."""

    def close(self) -> None:
        self._engine.destroy()
        if self._stage == 3:
            self._undo_what_outlives_it()
        self.module = nn.Module()
        self._engine = self._zero = self._accelerator = None
        collect()

    def _undo_what_outlives_it(self) -> None:
        """Stage 3 puts the model on a list of the whole process and leaves it there: a phase's weights would stay in
        memory through all later ones. And its own version of `linear` would serve every later model in torch's place.
        """
        from deepspeed.runtime.zero import parameter_offload
        from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses as Changed

        stack = parameter_offload.FWD_MODULE_STACK
        stack[:] = [module for module in stack if module is not self.module]
        functional.linear = getattr(Changed, "linear_bk", functional.linear)

    def _groups(self) -> list[list[Any]]:
        groups: list[list[Any]] = self._zero.fp16_groups if self._stage == 3 else self._zero.round_robin_bit16_groups
        return groups

    def _flats(self) -> list[torch.Tensor]:
        zero = self._zero
        flats: list[torch.Tensor] = (
            zero.fp32_partitioned_groups_flat if self._stage == 3 else zero.single_partition_of_fp32_groups
        )
        return flats

    def _pieces(self, index: int, group: list[Any]) -> Iterator[tuple[Any, int, int, int]]:
        """(parameter, offset in this rank's flat tensor, offset in the parameter, length) of each piece held here."""
        rank = dist.get_rank()
        if self._stage == 3:
            in_flat = 0
            for parameter in group:
                size = parameter.partition_numel()
                length = min(size, parameter.ds_numel - rank * size)
                if length > 0:
                    yield parameter, in_flat, rank * size, length
                in_flat += size
            return
        size = int(self._zero.partition_size[index])
        first, last = rank * size, (rank + 1) * size
        for parameter, offset in zip(group, self._zero.round_robin_bit16_offsets[index], strict=True):
            start, stop = max(offset, first), min(offset + parameter.numel(), last)
            if start < stop:
                yield parameter, start - first, start - offset, stop - start
