"""What a worker does with a config: train, or extract features; with `strategy: auto`, measure first."""

from typing import TYPE_CHECKING

import torch

from dist_finetune.features.accelerate import accelerate_heads
from dist_finetune.run import train
from dist_finetune.run_folder import Changes
from dist_finetune.spec import Spec
from dist_finetune.summary import Summary
from dist_finetune.world import join_world

if TYPE_CHECKING:
    from dist_finetune.features.files import FeatureSummary


def run_task(spec: Spec, fresh: bool = False, changes: Changes = "none") -> "Summary | FeatureSummary":
    """Does, as one rank of the job it finds itself in, what `spec` asks for. Raises DistFinetuneError."""
    # scikit-learn and matplotlib, which features and advice need, take seconds to import
    if spec.task == "features" or spec.strategy == "auto":
        accelerate_heads(torch.cuda.is_available())
    if spec.strategy == "auto":
        from dist_finetune.advise.run import follow_advice

        # Joined here, the process group lasts from the probes to the end; a second one would need a new rendezvous.
        with join_world(spec.launch):
            return run_task(follow_advice(spec), fresh, changes)
    if spec.task == "features":
        from dist_finetune.features.run import compare_heads

        return compare_heads(spec, fresh, changes)
    return train(spec, fresh, changes)
