"""Makes an engine and checks it: freezing and the optimizer come first, sharding last.

`shard` refuses an optimizer that isn't exactly the plan's trainable set, and after preparing it counts what the
optimizer and gradient partitions of all ranks really hold.
"""

import contextlib
import importlib
import logging
import os
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dist_finetune.engine.base import Engine
from dist_finetune.engine.blocks import prepare_blocks
from dist_finetune.engine.ddp import DdpEngine
from dist_finetune.engine.fsdp import FsdpEngine
from dist_finetune.engine.statistics import synchronise_batchnorm
from dist_finetune.engine.zero import ZeroEngine
from dist_finetune.errors import TrainingError, UserError
from dist_finetune.freeze import Manifest, check_frozen_flags
from dist_finetune.launchers.environment import scrubbed
from dist_finetune.phases import PhasePlan
from dist_finetune.plan import Plan
from dist_finetune.preflight import wait_longer
from dist_finetune.spec import SHARDED_WEIGHTS
from dist_finetune.world import World, sum_over_ranks


def open_accelerator(plan: Plan, phase: PhasePlan, world: World) -> Any:
    """An Accelerator set up from the plan alone, before the model loads; settings of the launcher stay out.

    Raises UserError where Accelerate or DeepSpeed see another world than torch.distributed does (issues of the kind
    accelerate#1795: N independent trainings).
    """
    _scrub_environment()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # torch's word to DeepSpeed about renamed collectives; a user can do nothing about it
    warnings.filterwarnings("ignore", r".*torch\.distributed\.\w+` is deprecated", FutureWarning)
    # DDP's word about depthwise convolutions, whose strides differ in a dimension of size 1, where they mean nothing
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides", UserWarning)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from accelerate import Accelerator, DistributedDataParallelKwargs
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)  # an earlier run in this process may have left one
        GradientState._reset_state()
        settings = plan.deepspeed[phase.index]
        if settings is None:
            # buffers are ours to keep alike, see engine/statistics.py; gradients lie in DDP's buckets, not beside them
            own = [DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)]
            accelerator = Accelerator(cpu=world.device.type == "cpu", kwargs_handlers=own)
            seen = {"Accelerate": accelerator.num_processes}
        else:
            import deepspeed
            from accelerate import DeepSpeedPlugin, InitProcessGroupKwargs

            # Its C++ op would be compiled at start-up, and crashes where no compiler is; gloo does the same work. Set
            # before anyone reads which ops there could be: DeepSpeed would run a compiler to find out.
            vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
            _import_without_compiling("deepspeed.runtime.zero.muon.muon_optimizer")
            _forget_closed_group()
            plugin = DeepSpeedPlugin(hf_ds_config=settings, zero3_init_flag=False)
            backend = "nccl" if world.device.type == "cuda" else "gloo"
            accelerator = Accelerator(
                deepspeed_plugin=plugin,
                gradient_accumulation_steps=plan.batches.gradient_accumulation_steps,
                kwargs_handlers=[InitProcessGroupKwargs(backend=backend)],
            )
            seen = {"Accelerate": accelerator.num_processes, "DeepSpeed": deepspeed.comm.get_world_size()}
        _scrub_environment()  # the plugin leaves its own, which a next run in this process would take for a launcher's
    for name, size in seen.items():
        if size != world.world_size:
            raise UserError(
                f"{name} sees {size} processes, torch.distributed {world.world_size}: {world.launcher} and the "
                "environment disagree; start one launcher only and remove ACCELERATE_* variables"
            )
    return accelerator


def _forget_closed_group() -> None:
    """DeepSpeed keeps its copy of the process group for the whole process: a second run in a notebook would meet that
    of the first one, which is closed."""
    from deepspeed.utils import groups

    try:
        dist.get_process_group_ranks(groups._WORLD_GROUP)
    except KeyError:
        groups._WORLD_GROUP = None


def _import_without_compiling(module: str) -> None:
    """For DeepSpeed's Muon optimizer: ZeRO imports it at its first step, whatever the optimizer is, and as it loads it
    hands functions to torch.compile, which costs a second of imports for nothing."""
    before = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        with contextlib.suppress(ImportError):  # other versions of DeepSpeed lack it
            importlib.import_module(module)
    finally:
        if before is None:
            del os.environ["TORCHDYNAMO_DISABLE"]
        else:
            os.environ["TORCHDYNAMO_DISABLE"] = before


def _scrub_environment() -> None:
    for name in scrubbed(os.environ):
        del os.environ[name]


def shard(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    plan: Plan,
    phase: PhasePlan,
    accelerator: Any,
    world: World,
    is_whole: bool = False,
) -> Engine:
    """The engine of the plan's strategy around a frozen model and the optimizer of its trainable parameters. With
    `is_whole` each rank's gradients are those of the whole step, and none are exchanged (ddp only).

    Raises TrainingError where the optimizer is not exactly the plan's trainable set, or what the engine holds
    afterwards is not the plan's trainable elements plus the engine's own padding.
    """
    check_frozen_flags(model, phase.manifest)
    _check_optimizer(model, optimizer, phase.manifest)
    if plan.strategy not in SHARDED_WEIGHTS:  # else weights are cut as they arrive there
        model.to(world.device)
    if world.device.type == "cuda" and world.world_size > 1:
        synchronise_batchnorm(model, phase.manifest)
    prepare_blocks(model, plan, phase)
    settings = plan.deepspeed[phase.index]
    if plan.strategy == "zero3" and settings is not None:
        _cut_for_zero3(model, settings, world.device)
    engine: Engine
    if plan.strategy == "fsdp":  # torch's own; Accelerate would leave it out on the CPU, without a word
        engine = FsdpEngine(model, optimizer, plan, phase, world.device)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if plan.strategy == "ddp" and (is_whole or world.world_size == 1):
                # Accelerate would put DDP, and with it a second copy of all gradients, around the model
                wrapped, prepared = model, accelerator.prepare(optimizer)
            else:
                wrapped, prepared = accelerator.prepare(model, optimizer)
            if plan.strategy.startswith("zero"):
                from deepspeed.utils import groups

                # made with torch's own timeout, whatever the group has that it is a copy of
                wait_longer(plan.spec.launch.timeout, groups._get_data_parallel_group())
        if plan.strategy == "ddp":
            engine = DdpEngine(wrapped, model, prepared, plan, accelerator)
        else:
            engine = ZeroEngine(wrapped, model, plan, accelerator)
    _check_held(engine, plan.strategy, phase.manifest, world)
    return engine


def _cut_for_zero3(model: nn.Module, settings: dict[str, Any], device: torch.device) -> None:
    """Moves each parameter to the device and keeps this rank's share of it, one after the other. DeepSpeed's engine by
    itself would move the whole model first, which a device need not have room for."""
    import deepspeed

    deepspeed.zero.Init(module=model, config_dict_or_path=settings)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)


def _check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, manifest: Manifest) -> None:
    """The optimizer holds exactly the plan's trainable parameters, in non-empty groups, each once."""
    names = {id(p): name for name, p in model.named_parameters()}
    held = [names.get(id(p), "a tensor that is not in the model") for g in optimizer.param_groups for p in g["params"]]
    if any(not group["params"] for group in optimizer.param_groups):
        raise TrainingError("the optimizer has an empty parameter group, which ZeRO can't partition")
    if sorted(held) != sorted(manifest.trainable):
        extra, missing = set(held) - set(manifest.trainable), set(manifest.trainable) - set(held)
        raise TrainingError(
            "the optimizer does not hold exactly the plan's trainable parameters; build it with build_optimizer(model, "
            f"phase.groups). Not planned: {sorted(extra)[:5]}. Missing: {sorted(missing)[:5]}."
        )


def _check_held(engine: Engine, strategy: str, manifest: Manifest, world: World) -> None:
    """Optimizer and gradient partitions of all ranks hold the trainable elements and the engine's padding, no more."""
    held = engine.held()
    names = {id(p): name for name, p in engine.module.named_parameters()}
    strangers = {names.get(id(p), "?") for p in held.parameters} ^ set(manifest.trainable)
    if strangers:
        raise TrainingError(f"{strategy} partitions other parameters than the plan trains: {sorted(strangers)[:5]}")
    expected = manifest.num_trainable
    totals = torch.tensor([held.optimizer, held.gradients, held.padding], dtype=torch.float64)
    if engine.is_partitioned:
        totals = sum_over_ranks(totals.to(world.device)).cpu()
    optimizer, gradients, padding = (round(v) for v in totals.tolist())
    if optimizer != expected + padding or gradients != expected + padding:
        raise TrainingError(
            f"{strategy} holds {optimizer:,} optimizer and {gradients:,} gradient elements over {world.world_size} "
            f"ranks; the plan trains {expected:,}, and padding is {padding:,}"
        )
