"""The training loop: the same samples, losses and learning rates at every world size and strategy."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from dist_finetune.checkpoint.saver import Saver
from dist_finetune.data.batches import StepBatch, training_steps
from dist_finetune.data.loading import Batch
from dist_finetune.drift import DriftCheck
from dist_finetune.engine.statistics import average_statistics
from dist_finetune.errors import TrainingError
from dist_finetune.evaluate import Evaluation, all_finite, evaluate, to_device
from dist_finetune.freeze import train_mode
from dist_finetune.job import Job, Progress, Stage
from dist_finetune.optim import lr_factor, set_lr
from dist_finetune.peak_memory import peak_memory_gib
from dist_finetune.phases import PhasePlan
from dist_finetune.run_folder import resume_command
from dist_finetune.stopping import Interrupted, Stopped, StopWish
from dist_finetune.tasks.names import is_better
from dist_finetune.tasks.task import task_of
from dist_finetune.world import sum_over_ranks


@dataclass
class StepLog:
    """Per-step values that stay on the device until the next flush, so that no step waits for the host."""

    losses: list[torch.Tensor] = field(default_factory=list)
    norms: list[torch.Tensor | float] = field(default_factory=list)
    steps: list[tuple[StepBatch, float]] = field(default_factory=list)
    is_whole: bool = False
    """True where each rank has the losses of whole steps, not those of its share."""
    waited_s: float = 0.0
    """Seconds that this rank waited for its batches."""
    started_s: float = field(default_factory=time.perf_counter)


def fit(job: Job, stage: Stage, progress: Progress, saver: Saver, stop: StopWish) -> Evaluation | None:
    """Trains the phase of `stage` from `progress.step` to its end; returns the last evaluation, None without one.

    Evaluates at the end of each epoch and of the phase, saves as the config says, and keeps `progress` current. Raises
    TrainingError where a loss or gradient norm is not finite, Stopped (with a checkpoint saved) where told to stop.
    """
    progress.cache_s += stage.cache_s
    if stage.is_uncached and stage.phase.index not in progress.uncached:
        progress.uncached.append(stage.phase.index)
    log, last = StepLog(is_whole=stage.is_whole), None
    try:
        if progress.before is None:
            progress.before = evaluate_validation(job, stage, 0, stop).metrics
        if not progress.evaluated:
            last = _evaluate(job, stage, progress, saver, stop)
        if _is_enough(job, stage.phase, progress):
            return last  # where the checkpoint was taken, the phase had just ended early
        steps = list(_steps_of(job, stage, progress))
        batches = stage.splits["train"].training_batches(steps)
        train_mode(stage.engine.module, stage.phase.manifest)
        drift = DriftCheck(job.world, progress.step + 1)
        log.started_s = time.perf_counter()
        for step in steps:
            stop.check()
            if stop.save_due:
                stop.save_due = False
                _flush(log, job, progress)  # which refuses a loss that is not finite: such weights are not kept
                saver.save(stage, progress)
            _train_step(job, stage, step, step.step - progress.phase_first_step, batches, log)
            progress.step, progress.evaluated = step.step + 1, not step.ends_epoch
            drift.after(progress.step, stage.engine)
            if len(log.steps) >= job.plan.spec.train.log_every or step.ends_epoch:
                _flush(log, job, progress)
            if step.ends_epoch:
                last = _evaluate(job, stage, progress, saver, stop)
                train_mode(stage.engine.module, stage.phase.manifest)
                log.started_s = time.perf_counter()
                if _is_enough(job, stage.phase, progress):
                    break
            if saver.is_due(progress.step):
                _flush(log, job, progress)
                saver.save(stage, progress)
    except Interrupted as interruption:
        stop.settle()
        _flush(log, job, progress)
        saver.save(stage, progress)
        raise stopped(interruption, job, progress, saver) from None
    stop.settle()
    return last


def stopped(interruption: Interrupted, job: Job, progress: Progress, saver: Saver) -> Stopped:
    """The error that ends a run which was told to stop, once its checkpoint is complete. Collective."""
    saver.settled()
    return Stopped(
        f"stopped on {interruption} after step {progress.step} of {job.plan.total_steps}; checkpoint saved. "
        f"Go on with: {resume_command(job.folder)}"
    )


def _steps_of(job: Job, stage: Stage, progress: Progress) -> Iterator[StepBatch]:
    """This rank's share of the steps; all of them as one process takes them, where each rank computes them whole."""
    plan, rows = job.plan, stage.splits["train"]
    rank, world_size = _dealt_to(job, stage)
    shares, tokens = job.world.world_size // world_size, plan.batches.micro_batch_tokens
    return training_steps(
        rows.num_rows,
        plan.batches.global_batch_size,
        plan.batches.micro_batch_size * shares,
        progress.phase_first_step + stage.phase.num_steps,
        plan.spec.train.seed,
        rank,
        world_size,
        rows.lengths,
        first_step=progress.step,
        targets=rows.num_targets,
        micro_batch_tokens=tokens * shares if tokens else None,
    )


def _dealt_to(job: Job, stage: Stage) -> tuple[int, int]:
    """Which rank of how many this one is, where the rows of a step are dealt."""
    return (0, 1) if stage.is_whole else (job.world.rank, job.world.world_size)


def _train_step(
    job: Job, stage: Stage, step: StepBatch, phase_step: int, batches: Iterator[Batch], log: StepLog
) -> None:
    """One optimizer step: all micro-batches, their reduction (at the last of them; under zero2 and zero3 at each), one
    update.

    The loss of each micro-batch is a sum over its rows, or labelled words, divided by the global batch's real count, so
    that partial windows and uneven shares weigh each of them the same; times the number of ranks that share the step,
    because engines average over them. Filler micro-batches weigh nothing (but BatchNorm that trains sees their row).
    """
    world, engine, phase = job.world, stage.engine, stage.phase
    rank, world_size = _dealt_to(job, stage)
    task, num_targets = task_of(job.plan.data.task), max(1, step.num_targets)
    _seed(_seed_of(job.plan.spec.train.seed, step.step, rank), world.device)
    lr = set_lr(engine.param_groups, lr_factor(phase_step, phase.num_steps, phase.warmup_steps, phase.schedule))
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    for i, micro in enumerate(step.micro_batches):
        is_last = i == len(step.micro_batches) - 1
        asked_s = time.perf_counter()
        batch = next(batches)
        log.waited_s += time.perf_counter() - asked_s
        labels = batch["labels"].to(world.device, non_blocking=True)
        logits = engine.forward(to_device(batch["inputs"], world.device), is_last)
        loss = task.loss(logits, labels)
        engine.backward(loss * (0.0 if micro.is_filler else world_size / num_targets), is_last)
        if not micro.is_filler:
            total += loss.detach()
    log.norms.append(engine.step())
    average_statistics(stage.statistics)
    log.losses.append(total / num_targets)
    log.steps.append((step, lr))


def _seed(seed: int, device: torch.device) -> None:
    """Seeds what a step draws from. `torch.manual_seed` asks every kind of device, which takes a millisecond."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _seed_of(seed: int, step: int, rank: int) -> int:
    """Seed of a rank's random numbers (dropout) in one step: a resumed run draws the same, and no state is kept."""
    return ((seed * 1_000_003 + step) * 65_537 + rank) % 2**64  # as torch's generators take no more bits


def _flush(log: StepLog, job: Job, progress: Progress) -> None:
    """Writes the metrics of the steps since the last flush; the only place where training waits for the device."""
    if not log.steps:
        return
    mine = torch.stack(log.losses)
    losses = (mine if log.is_whole else sum_over_ranks(mine)).tolist()
    norms = [float(n) for n in log.norms]
    elapsed = time.perf_counter() - log.started_s
    progress.train_s += elapsed
    samples = sum(step.num_samples for step, _ in log.steps)
    num_trainable = job.plan.phases[progress.phase].manifest.num_trainable
    peak_gib = round(peak_memory_gib(job.world.device), 4)
    for (step, lr), loss, norm in zip(log.steps, losses, norms, strict=True):
        skipped = not all_finite([norm])
        if skipped or not all_finite([loss]):
            _count_skipped(job, progress, step.step, lr, loss, norm)
        job.report.log(
            step.step + 1,
            {
                **({"train/loss": loss} if all_finite([loss]) else {}),
                "train/lr": lr,
                **({"train/skipped": 1} if skipped else {"train/grad_norm": norm}),
                "perf/samples_per_s": samples / elapsed,
                "perf/step_s": elapsed / len(log.steps),
                "perf/data_wait_s": log.waited_s / len(log.steps),
                "progress/epoch": (step.step + 1) / job.plan.batches.steps_per_epoch,
                "progress/samples": _samples_after(step.step + 1, job),
                "params/trainable": num_trainable,
                "mem/peak_gib": peak_gib,
            },
        )
    log.losses.clear()
    log.norms.clear()
    log.steps.clear()
    log.waited_s = 0.0
    log.started_s = time.perf_counter()


def _count_skipped(job: Job, progress: Progress, step: int, lr: float, loss: float, norm: float) -> None:
    """Notes a step that the engines left out. Raises TrainingError where it may not be, or they have not."""
    if job.plan.precision == "fp16" and all_finite([loss]):
        return  # gradients beyond fp16's range: a smaller loss scale comes next
    allowed = job.plan.spec.train.max_skipped
    if progress.skipped < allowed and not all_finite([norm]):
        progress.skipped += 1
        job.report.say(f"note: step {step + 1} left out: train/loss is {loss} ({progress.skipped} of {allowed} may be)")
        return
    before = f" {progress.skipped} steps had been left out before (train.max_skipped)." if progress.skipped else ""
    raise TrainingError(
        f"step {step + 1}: train/loss is {loss}, train/grad_norm is {norm}.{before} Nothing was saved since; go on "
        f"from before with a lower rate (now {lr:.3g}): {resume_command(job.folder)} --allow train.lr=..., leave "
        "such steps out with train.max_skipped=10, or start anew with a longer train.warmup or train.precision=fp32"
    )


def _samples_after(steps: int, job: Job) -> int:
    epochs, rest = divmod(steps, job.plan.batches.steps_per_epoch)
    return epochs * job.splits["train"].num_rows + rest * job.plan.batches.global_batch_size


def evaluate_validation(job: Job, stage: Stage, step: int, stop: StopWish) -> Evaluation:
    """Evaluates the validation rows and logs their metrics at `step`. Collective."""
    stop.new_pace()
    result = evaluate(stage.engine, stage.splits["validation"], job.plan.batches.eval_batch_size, job.world, stop.check)
    stop.new_pace()
    job.report.log(step, {f"eval/{name}": value for name, value in result.metrics.items()})
    return result


def _evaluate(job: Job, stage: Stage, progress: Progress, saver: Saver, stop: StopWish) -> Evaluation:
    """An evaluation at the end of an epoch, and what follows from it: the best so far, and whether that is kept."""
    result = evaluate_validation(job, stage, progress.step, stop)
    progress.evaluated = True
    best_key = job.plan.spec.checkpoint.best
    if is_better(result.metrics, progress.best, job.plan.data.task, best_key):
        progress.best, progress.best_step, progress.without_gain = result.metrics, progress.step, 0
        if best_key:
            saver.save(stage, progress, best=True)
    else:
        progress.without_gain += 1
    return result


def _is_enough(job: Job, phase: PhasePlan, progress: Progress) -> bool:
    """True where the phase waits for a plateau and met one, or has used up `train.early_stop`. A next phase trains
    other parts, and so starts with patience of its own."""
    if phase.until == "plateau" and progress.without_gain > 0:
        job.report.say(f"phase {phase.name}: plateau after step {progress.step}")
        return True
    patience = job.plan.spec.train.early_stop
    if patience and progress.without_gain >= patience:
        after = [later.name for later in job.plan.phases[phase.index + 1 :]]
        what = f"phase {phase.name} ends early, {after[0]} comes next" if after else "stopping early"
        job.report.say(f"{what}: {progress.without_gain} evaluations without a better score")
        return True
    return False
