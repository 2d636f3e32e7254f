"""What is done to a model block by block before it is sharded: recomputation in the backward pass, and compilation.

Both replace the forward of the block's modules and leave modules, names and hooks as they are, so that engines, freeze
and checkpoints see the model that the plan describes.
"""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dist_finetune.phases import PhasePlan
from dist_finetune.plan import Plan
from dist_finetune.recompute import called_modules, recomputed, recomputed_blocks


def prepare_blocks(model: nn.Module, plan: Plan, phase: PhasePlan) -> None:
    """Compiles every block, and makes those that the backward pass goes through recompute, as the plan asks."""
    train, passed = plan.spec.train, recomputed_blocks(phase.manifest, plan.structure)
    for block in plan.structure.blocks:
        for module in called_modules(model, block):
            if train.compile:
                # lengths of texts differ from batch to batch
                module.forward = torch.compile(module.forward, dynamic=True if plan.data.modality == "text" else None)
            if train.gradient_checkpointing and block in passed:
                norms = [norm for norm in module.modules() if isinstance(norm, _BatchNorm)]
                module.forward = recomputed(module.forward, norms)
