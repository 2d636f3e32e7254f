"""When to save, and what belongs into a checkpoint."""

import time
from collections.abc import Iterator
from typing import Any, Self

import torch

from dist_finetune.checkpoint.layout import FOLDER, folder_name
from dist_finetune.checkpoint.read import Checkpoint, open_checkpoint
from dist_finetune.checkpoint.write import CheckpointWriter, snapshot
from dist_finetune.engine import Engine
from dist_finetune.hold import Hold
from dist_finetune.job import Job, Progress, Stage, identity
from dist_finetune.models.card import Provenance
from dist_finetune.proof import verify_frozen
from dist_finetune.world import on_first

FINISH_S = 10.0  # what a failed run waits for the save that is being written; a lost rank's shard never comes


class Saver:
    """Saves a run's checkpoints as `checkpoint` in its config says. All methods are collective."""

    def __init__(self, job: Job, provenance: Provenance, progress: Progress, hold: Hold) -> None:
        spec = job.plan.spec
        self._job, self._provenance, self._hold = job, provenance, hold
        best_step = progress.best_step if spec.checkpoint.best and progress.best else None
        self._writer = CheckpointWriter(
            job.folder, spec.checkpoint.keep, best_step, job.world, spec.launch.file_timeout, job.report.say
        )
        self.pauses_s: list[float] = []
        """How long each save kept training waiting: for an earlier one, and for the copy to host memory."""
        number, unit = spec.checkpoint.every
        steps_per_unit = {"steps": 1, "epochs": job.plan.batches.steps_per_epoch}.get(unit)
        self._every_steps = max(1, round(number * steps_per_unit)) if steps_per_unit else None
        self.every_s = number if unit == "s" else None
        self._saved_step: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind:
            self._writer.let_finish(FINISH_S)

    def is_due(self, step: int) -> bool:
        """True where the interval in steps or epochs ends after optimizer step `step`; an interval in seconds is agreed
        on by the ranks, see `StopWish`."""
        return self._every_steps is not None and step % self._every_steps == 0

    def save(self, stage: Stage, progress: Progress, best: bool = False) -> None:
        """Saves the run as it is after `progress.step`, unless that step is saved already. `best` keeps it for good.
        Raises LostHold where the folder is another job's by now."""
        self.require_hold()
        if self._saved_step == progress.step:
            if best:
                self._writer.protect(progress.step)
            return
        self._saved_step = progress.step
        started_s = time.perf_counter()
        verify_frozen(stage.engine, stage.held_digests, self._job.world)
        tensors = snapshot(stage.engine, self._job.world, self._whole(stage))
        self._writer.save(progress.step, tensors, self._state(stage.engine, progress), best)
        self.pauses_s.append(time.perf_counter() - started_s)

    def require_hold(self) -> None:
        """Raises LostHold where the run's folder is another job's by now: nothing more may be written there."""
        on_first(self._job.world, self._hold.require)

    def settled(self) -> Checkpoint:
        """The checkpoint that was saved last, once it is complete. Raises TrainingError where saving failed."""
        self._writer.wait(must_succeed=True)
        return self.saved_at(self._saved_step or 0)

    def best_step(self) -> int | None:
        """Step of the best checkpoint that could be saved."""
        return self._writer.protected()

    def saved_at(self, step: int) -> Checkpoint:
        """The checkpoint of a step that was saved and kept."""
        return open_checkpoint(self._job.folder / FOLDER / folder_name(step))

    def _state(self, engine: Engine, progress: Progress) -> dict[str, Any]:
        return {
            "name": folder_name(progress.step),
            "identity": identity(self._job.plan, self._provenance),
            "progress": progress.to_json(),
            "adam_steps": engine.adam_steps(),
            "loss_scale": engine.loss_scale.state,
            "world_size": self._job.world.world_size,
            "strategy": self._job.plan.strategy,
            "source": self._provenance.id,
            "revision": self._provenance.revision,
        }

    def _whole(self, stage: Stage) -> Iterator[tuple[str, torch.Tensor]]:
        """Tensors outside the optimizer that differ from the base model: moved buffers, weights of earlier phases."""
        module, phase = stage.engine.module, stage.phase
        parameters, buffers = dict(module.named_parameters()), dict(module.named_buffers())
        phases = self._job.plan.phases[: phase.index + 1]
        frozen_buffers = set.intersection(*(set(p.manifest.frozen_buffers) for p in phases))
        for record in phase.manifest.records:
            if record.kind == "buffer" and record.name not in frozen_buffers:
                yield f"buffer:{record.name}", buffers[record.name]
        full = self._job.plan.spec.checkpoint.full
        trained = {name for p in phases for name in p.manifest.trainable}
        for name in phase.manifest.frozen:
            if full or name in trained:
                yield f"settled:{name}", parameters[name]
        for name, tensor in stage.dropped.items():
            yield f"settled:{name}", tensor
