"""The one file that talks to Accelerate and DeepSpeed: from (model, optimizer, plan) to something that steps.

Freezing and the optimizer come first; `shard` refuses an optimizer that isn't exactly the plan's trainable set, and after
preparing it counts what the optimizer and gradient partitions of all ranks really hold.
"""

import contextlib
import functools
import logging
import os
import warnings
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from dist_finetune.errors import TrainingError, UserError
from dist_finetune.freeze import check_frozen_flags
from dist_finetune.launchers.environment import scrubbed
from dist_finetune.models.sources import forward_logits
from dist_finetune.plan import Plan
from dist_finetune.world import World, sum_over_ranks

Inputs = dict[str, torch.Tensor] | torch.Tensor


@dataclass(frozen=True)
class Held:
    """What one rank's engine holds for training, in elements. Partitions are summed over ranks, replicas are not."""

    parameters: list[torch.Tensor]
    optimizer: int
    gradients: int
    padding: float
    is_partition: bool


class Engine(Protocol):
    """What the training loop needs of a sharded model. `module` is the model itself, without wrappers."""

    module: nn.Module

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Groups of the optimizer; setting `lr` in them takes effect at the next step."""
        ...

    def forward(self, inputs: Inputs, is_last: bool) -> torch.Tensor:
        """Logits (B, num_classes) in fp32 with gradients; `is_last` marks the step's last micro-batch."""
        ...

    def backward(self, loss: torch.Tensor, is_last: bool) -> None:
        """Adds the gradients of a scalar `loss`; reduces them over ranks at the step's last micro-batch or before."""
        ...

    def step(self) -> torch.Tensor | float:
        """Clips, updates and clears the gradients; returns their global norm before clipping."""
        ...

    def predict(self, inputs: Inputs) -> torch.Tensor:
        """Logits (B, num_classes) in fp32 without gradients. Collective where weights are sharded."""
        ...

    def gathered(self, tensor: torch.Tensor) -> AbstractContextManager[Any]:
        """Within it, the tensor is whole on every rank. Collective where weights are sharded."""
        ...

    def held_elements(self) -> Held:
        """What this rank's optimizer and gradient partitions hold."""
        ...

    def close(self) -> None:
        """Frees what the engine holds."""
        ...


def open_accelerator(plan: Plan, world: World) -> Any:
    """An Accelerator set up from the plan alone, before the model loads; settings of the launcher stay out.

    Raises UserError where Accelerate or DeepSpeed see another world than torch.distributed does (issues of the kind
    accelerate#1795: N independent trainings).
    """
    for name in scrubbed(os.environ):
        del os.environ[name]
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)  # an earlier run in this process may have left one
        GradientState._reset_state()
        if plan.deepspeed is None:
            accelerator = Accelerator(cpu=world.device.type == "cpu")
            seen = {"Accelerate": accelerator.num_processes}
        else:
            import deepspeed
            from accelerate import DeepSpeedPlugin, InitProcessGroupKwargs

            # Its C++ op would be compiled at start-up, and crashes where no compiler is; gloo does the same work.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
            plugin = DeepSpeedPlugin(hf_ds_config=plan.deepspeed, zero3_init_flag=False)
            backend = "nccl" if world.device.type == "cuda" else "gloo"
            accelerator = Accelerator(
                deepspeed_plugin=plugin,
                gradient_accumulation_steps=plan.batches.gradient_accumulation_steps,
                kwargs_handlers=[InitProcessGroupKwargs(backend=backend)],
            )
            seen = {"Accelerate": accelerator.num_processes, "DeepSpeed": deepspeed.comm.get_world_size()}
    for name, size in seen.items():
        if size != world.world_size:
            raise UserError(
                f"{name} sees {size} processes, torch.distributed {world.world_size}: {world.launcher} and the environment "
                "disagree; start one launcher only and remove ACCELERATE_* variables"
            )
    return accelerator


def shard(model: nn.Module, optimizer: torch.optim.Optimizer, plan: Plan, accelerator: Any, world: World) -> Engine:
    """The engine of the plan's strategy around a frozen model and the optimizer of its trainable parameters.

    Raises TrainingError where the optimizer is not exactly the plan's trainable set, or what the engine holds afterwards
    is not the plan's trainable elements plus the engine's own padding.
    """
    check_frozen_flags(model, plan.manifest)
    _check_optimizer(model, optimizer, plan)
    model.to(world.device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped, prepared = accelerator.prepare(model, optimizer)
    engine: Engine
    if plan.strategy == "ddp":
        engine = DdpEngine(wrapped, model, prepared, plan, accelerator)
    else:
        engine = ZeroEngine(wrapped, model, int(plan.strategy.removeprefix("zero")), accelerator)
    _check_held(engine, plan, world)
    return engine


class DdpEngine:
    """Plain data parallelism; only gradients of trainable parameters are reduced, once a step."""

    def __init__(self, wrapped: nn.Module, module: nn.Module, optimizer: Any, plan: Plan, accelerator: Any) -> None:
        self.module = module
        self._wrapped, self._optimizer, self._accelerator = wrapped, optimizer.optimizer, accelerator
        self._max_grad_norm = plan.spec.train.max_grad_norm or float("inf")
        self._autocast = functools.partial(
            torch.autocast, plan.topology.device, torch.bfloat16, enabled=plan.precision == "bf16"
        )

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = self._optimizer.param_groups
        return groups

    def forward(self, inputs: Inputs, is_last: bool) -> torch.Tensor:
        with self._synchronised(is_last), self._autocast():
            return forward_logits(self._wrapped, inputs).float()

    def backward(self, loss: torch.Tensor, is_last: bool) -> None:
        with self._synchronised(is_last):
            loss.backward()

    def step(self) -> torch.Tensor | float:
        parameters = [p for group in self.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self._max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def predict(self, inputs: Inputs) -> torch.Tensor:
        with torch.inference_mode(), self._autocast():
            return forward_logits(self.module, inputs).float()

    def gathered(self, tensor: torch.Tensor) -> AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def held_elements(self) -> Held:
        numels = sum(p.numel() for group in self.param_groups for p in group["params"])
        return Held([p for group in self.param_groups for p in group["params"]], numels, numels, 0, is_partition=False)

    def close(self) -> None:
        self._accelerator.free_memory()

    def _synchronised(self, is_last: bool) -> AbstractContextManager[Any]:
        """DDP reduces in the backward pass of the last micro-batch only. One process has no DDP around the model."""
        if is_last or not isinstance(self._wrapped, nn.parallel.DistributedDataParallel):
            return contextlib.nullcontext()
        return self._wrapped.no_sync()


class ZeroEngine:
    """DeepSpeed ZeRO stages 1 to 3, driven directly: our loop says where an accumulation window ends."""

    def __init__(self, engine: Any, module: nn.Module, stage: int, accelerator: Any) -> None:
        self.module = module
        self._engine, self._stage, self._accelerator = engine, stage, accelerator

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = self._engine.optimizer.param_groups
        return groups

    def forward(self, inputs: Inputs, is_last: bool) -> torch.Tensor:
        return forward_logits(self._engine, inputs).float()

    def backward(self, loss: torch.Tensor, is_last: bool) -> None:
        self._engine.backward(loss, scale_wrt_gas=False)  # the loss is already divided by the global batch's real count

    def step(self) -> torch.Tensor | float:
        self._engine.step()
        norm: torch.Tensor | float = self._engine.get_global_grad_norm()
        return norm

    def predict(self, inputs: Inputs) -> torch.Tensor:
        # stage 3 fills and frees weights in forward hooks, which inference tensors would not allow
        with torch.no_grad() if self._stage == 3 else torch.inference_mode():
            return forward_logits(self._engine, inputs).float()

    def gathered(self, tensor: torch.Tensor) -> AbstractContextManager[Any]:
        if self._stage < 3 or not hasattr(tensor, "ds_id"):
            return contextlib.nullcontext()
        import deepspeed

        context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters([tensor])
        return context

    def held_elements(self) -> Held:
        zero = self._engine.optimizer
        if self._stage == 3:
            parameters = [p for group in zero.fp16_groups for p in group]
            optimizer = sum(flat.numel() for flat in zero.fp32_partitioned_groups_flat)
            gradients = zero.grad_partitions_flat_buffer.numel()
            world_size = torch.distributed.get_world_size()
            padding = sum(p.partition_numel() * world_size - p.ds_numel for p in parameters)
            # every rank knows the padding of all ranks, so that a share of it keeps the sum over ranks exact
            return Held(parameters, optimizer, gradients, padding / world_size, is_partition=True)
        parameters = [p for group in zero.bit16_groups for p in group]
        optimizer = sum(flat.numel() for flat in zero.single_partition_of_fp32_groups)
        gradients = sum(int(size) for size in zero.partition_size)
        inner = sum(sum(padding) for padding in zero.round_robin_bit16_padding) / torch.distributed.get_world_size()
        return Held(parameters, optimizer, gradients, sum(zero.groups_padding) + inner, is_partition=True)

    def close(self) -> None:
        self._engine.destroy()
        self._accelerator.deepspeed_engine_wrapped = None
        self._accelerator.free_memory()


def _check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, plan: Plan) -> None:
    """The optimizer holds exactly the plan's trainable parameters, in non-empty groups, each once."""
    names = {id(p): name for name, p in model.named_parameters()}
    held = [names.get(id(p), "a tensor that is not in the model") for g in optimizer.param_groups for p in g["params"]]
    if any(not group["params"] for group in optimizer.param_groups):
        raise TrainingError("the optimizer has an empty parameter group, which ZeRO can't partition")
    if sorted(held) != sorted(plan.manifest.trainable):
        extra, missing = set(held) - set(plan.manifest.trainable), set(plan.manifest.trainable) - set(held)
        raise TrainingError(
            "the optimizer does not hold exactly the plan's trainable parameters; build it with build_optimizer(model, "
            f"plan.groups). Not planned: {sorted(extra)[:5]}. Missing: {sorted(missing)[:5]}."
        )


def _check_held(engine: Engine, plan: Plan, world: World) -> None:
    """Optimizer and gradient partitions of all ranks hold the trainable elements and the engine's padding, no more."""
    held = engine.held_elements()
    names = {id(p): name for name, p in engine.module.named_parameters()}
    strangers = {names.get(id(p), "?") for p in held.parameters} ^ set(plan.manifest.trainable)
    if strangers:
        raise TrainingError(f"{plan.strategy} partitions other parameters than the plan trains: {sorted(strangers)[:5]}")
    expected = plan.manifest.num_trainable
    totals = torch.tensor([held.optimizer, held.gradients, held.padding], dtype=torch.float64)
    if held.is_partition:
        totals = sum_over_ranks(totals.to(world.device)).cpu()
    optimizer, gradients, padding = (round(v) for v in totals.tolist())
    if optimizer != expected + padding or gradients != expected + padding:
        raise TrainingError(
            f"{plan.strategy} holds {optimizer:,} optimizer and {gradients:,} gradient elements over {world.world_size} "
            f"ranks; the plan trains {expected:,}, and padding is {padding:,}"
        )
