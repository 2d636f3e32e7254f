"""From (model, optimizer, plan) to something that steps. The only package that talks to Accelerate and DeepSpeed.

`base` says what an engine is, `ddp` and `zero` are the engines, `build` makes and checks one.
"""

from dist_finetune.engine.base import Engine, Fragment, Inputs, Predictor
from dist_finetune.engine.build import open_accelerator, shard

__all__ = ["Engine", "Fragment", "Inputs", "Predictor", "open_accelerator", "shard"]
