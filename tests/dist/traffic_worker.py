"""What engines send in optimizer steps, collective by collective: traffic_worker.py CONFIG RESULTS.json STRATEGY...

For each strategy this opens the run's stage and takes real steps as `run.train` does, while every collective that
reaches torch's dispatcher is noted: those of DDP's reducer, DeepSpeed and FSDP all do. Writes to RESULTS.json.RANK the
collectives of each step, [name, bytes], what the plan says, and how often a step and the bare model read numbers.
"""

import os
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
from by_strategy import write_found
from torch.utils._python_dispatch import TorchDispatchMode

from dist_finetune.freeze import train_mode
from dist_finetune.job import Progress
from dist_finetune.models.sources import forward_logits
from dist_finetune.report import Reporter
from dist_finetune.run import _prepare
from dist_finetune.signals import StopSignals
from dist_finetune.spec_file import load_spec
from dist_finetune.stage import load_base, open_stage
from dist_finetune.training import StepLog, _steps_of, _train_step
from dist_finetune.world import World

STEPS = 5


class Collectives(TorchDispatchMode):
    """Notes every collective with the bytes of the largest of its lists of tensors, the whole that it is about; and how
    often the host reads a number, for which it would wait on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []
        self.reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.seen.append((func._schema.name, max(map(num_bytes, args))))
        self.reads += func._schema.name == "aten::_local_scalar_dense"
        return func(*args, **(kwargs or {}))


def num_bytes(argument: Any) -> int:
    """Bytes of a tensor, or of all in nested lists; 0 for what is none."""
    if isinstance(argument, torch.Tensor):
        return argument.nbytes
    return sum(map(num_bytes, argument)) if isinstance(argument, list | tuple) else 0


def steps_of(config: str, strategy: str, world: World) -> dict[str, Any]:
    spec = load_spec(config, [f"shard.strategy={strategy}"])
    job = _prepare(spec, world, Reporter(is_first=False), StopSignals())
    model, _ = load_base(job.plan, job.world, job.report)
    with Collectives() as bare:
        forward_logits(model, job.splits["train"].first_batch()["inputs"])
    stage = open_stage(job, job.plan.phases[0], None, model)
    steps = list(_steps_of(job, stage, Progress()))[:STEPS]
    batches = stage.splits["train"].training_batches(steps)
    train_mode(stage.engine.module, stage.phase.manifest)
    seen, reads = [], []
    for step in steps:
        with Collectives() as collectives:
            _train_step(job, stage, step, step.step, batches, StepLog())
        seen.append(collectives.seen)
        reads.append(collectives.reads)
    stage.engine.close()
    return {
        "steps": seen, "planned": job.plan.memory[job.plan.strategy].traffic,
        "micro_batches": job.plan.batches.gradient_accumulation_steps, "taken": [len(s.micro_batches) for s in steps],
        "reads": reads, "reads_of_model": bare.reads,
    }  # fmt: skip


if __name__ == "__main__":
    write_found(steps_of)
