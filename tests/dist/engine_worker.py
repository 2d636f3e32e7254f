"""What engines really hold, rank by rank: engine_worker.py CONFIG RESULTS.json STRATEGY...

For each strategy this opens the run's stage as `run.train` does and writes to RESULTS.json.RANK: the fragments that
this rank updates, the counts that the engine states, whether its check refuses the manifest of another freeze, how
it predicts, how many of the engine's tensors are still there once it is closed, and of those that a cache drops.
"""

import os
import weakref
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

from by_strategy import write_found

from dist_finetune.engine.build import _check_held
from dist_finetune.errors import TrainingError
from dist_finetune.freeze import compile_freeze
from dist_finetune.report import Reporter
from dist_finetune.run import _prepare
from dist_finetune.signals import StopSignals
from dist_finetune.spec import FreezeSpec
from dist_finetune.spec_file import load_spec
from dist_finetune.stage import load_base, open_stage
from dist_finetune.world import World


def look(config: str, strategy: str, world: World) -> dict[str, Any]:
    spec = load_spec(config, [f"shard.strategy={strategy}"])
    job = _prepare(spec, world, Reporter(is_first=False), StopSignals())
    phase = job.plan.phases[0]
    model, _ = load_base(job.plan, job.world, job.report)
    replicated = len(phase.manifest.frozen) if job.plan.costs.frozen_layout == "replicate" else 0
    loaded = {name: weakref.ref(parameter) for name, parameter in model.named_parameters()}
    wider = compile_freeze(FreezeSpec(rule="backbone"), job.plan.structure, model)
    stage = open_stage(job, phase, None, model)
    engine = stage.engine
    held = engine.held()
    names = {record.name for record in stage.phase.manifest.records}
    dropped = [loaded[name] for name in loaded.keys() - names]
    counts = {"optimizer": held.optimizer, "gradients": held.gradients, "padding": held.padding}
    mapped = sum("dist-finetune-" in line for line in Path("/proc/self/maps").read_text().splitlines())
    try:
        _check_held(engine, strategy, wider, world)
        refusal = ""
    except TrainingError as error:
        refusal = str(error)
    fragments = [
        (f.name, f.offset, f.weight.numel(), [f.moments[kind].numel() for kind in sorted(f.moments)])
        for f in engine.fragments()
    ]
    logits = engine.predict(stage.splits["validation"].first_batch()["inputs"])
    moments = [moment for f in engine.fragments() for moment in f.moments.values()]
    tensors = [*engine.module.parameters(), *(m if m._base is None else m._base for m in moments)]
    left = [weakref.ref(tensor) for tensor in tensors]
    num_buffers = len(list(model.buffers()))
    del model, stage, held, moments, tensors
    engine.close()
    sizes = {r.name: r.num_elements for r in phase.manifest.records if r.kind == "parameter"}
    return {
        "fragments": fragments, **counts,
        "trainable": phase.manifest.trainable, "sizes": sizes, "refusal": refusal,
        "mapped": mapped, "buffers": num_buffers, "replicated": replicated,
        "dropped": len(dropped), "dropped_left": sum(parameter() is not None for parameter in dropped),
        "held": len(left), "left": sum(tensor() is not None for tensor in left),
        "inference": logits.is_inference(), "graph": logits.requires_grad,
    }  # fmt: skip


if __name__ == "__main__":
    write_found(look)
