"""The training loop: the same samples, losses and learning rates at every world size and strategy."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from dist_finetune.data.batches import StepBatch, training_steps
from dist_finetune.data.loading import Batch, Rows
from dist_finetune.engine import Engine
from dist_finetune.errors import TrainingError, UserError
from dist_finetune.evaluate import Evaluation, all_finite, is_better, to_device
from dist_finetune.freeze import train_mode
from dist_finetune.models.sources import forward_logits
from dist_finetune.optim import lr_factor, set_lr
from dist_finetune.plan import Plan
from dist_finetune.report import Reporter
from dist_finetune.world import World, gather_objects, sum_over_ranks

IGNORED_LABEL = -100  # rows of filler micro-batches carry it, so that they add nothing to loss or gradient


@dataclass
class StepLog:
    """Per-step values that stay on the device until the next flush, so that no step waits for the host."""

    losses: list[torch.Tensor] = field(default_factory=list)
    norms: list[torch.Tensor | float] = field(default_factory=list)
    steps: list[tuple[StepBatch, float]] = field(default_factory=list)
    started_s: float = field(default_factory=time.perf_counter)


@dataclass(frozen=True)
class FitResult:
    steps: int
    train_s: float
    stopped_early: bool
    last: Evaluation


def fit(
    engine: Engine, rows: Rows, plan: Plan, world: World, report: Reporter, evaluate_now: Callable[[int], Evaluation]
) -> FitResult:
    """Trains for the plan's steps; evaluates at every epoch's end through `evaluate_now(step)`.

    Raises TrainingError where a loss or gradient norm is not finite.
    """
    steps = _steps_of(rows, plan, world)
    log, best, without_gain, train_s, done = StepLog(), None, 0, 0.0, 0
    train_mode(engine.module, plan.manifest)
    batches = rows.training_batches(steps)
    for epoch_steps in _by_epoch(steps):
        started = time.perf_counter()
        for step in epoch_steps:
            _train_step(engine, step, batches, plan, world, log)
            if len(log.steps) >= plan.spec.train.log_every:
                _flush(log, plan, world, report)
        _flush(log, plan, world, report)
        train_s += time.perf_counter() - started
        done = epoch_steps[-1].step + 1
        last = evaluate_now(done)
        train_mode(engine.module, plan.manifest)
        log.started_s = time.perf_counter()
        without_gain = 0 if is_better(last.metrics, best) else without_gain + 1
        best = last.metrics if without_gain == 0 else best
        if plan.spec.train.early_stop and without_gain >= plan.spec.train.early_stop:
            report.say(f"stopping early: {without_gain} evaluations without a better score")
            break
    return FitResult(done, train_s, done < plan.batches.total_steps, last)


def _steps_of(rows: Rows, plan: Plan, world: World) -> list[StepBatch]:
    return list(
        training_steps(
            rows.num_rows,
            plan.batches.global_batch_size,
            plan.batches.micro_batch_size,
            plan.batches.total_steps,
            plan.spec.train.seed,
            world.rank,
            world.world_size,
            rows.lengths,
        )
    )


def _by_epoch(steps: list[StepBatch]) -> list[list[StepBatch]]:
    epochs: dict[int, list[StepBatch]] = {}
    for step in steps:
        epochs.setdefault(step.epoch, []).append(step)
    return list(epochs.values())


def _train_step(engine: Engine, step: StepBatch, batches: Iterator[Batch], plan: Plan, world: World, log: StepLog) -> None:
    """One optimizer step: all micro-batches, one reduction, one update.

    The loss of each micro-batch is a sum over its rows divided by the global batch's real count, so that partial windows
    and uneven shares weigh every sample the same; times world size, because engines average gradients over ranks.
    """
    factor = lr_factor(step.step, plan.batches.total_steps, plan.batches.warmup_steps, plan.spec.train.schedule)
    lr = set_lr(engine.param_groups, factor)
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    for i, micro in enumerate(step.micro_batches):
        is_last = i == len(step.micro_batches) - 1
        batch = next(batches)
        labels = batch["labels"].to(world.device, non_blocking=True)
        if micro.is_filler:
            labels = torch.full_like(labels, IGNORED_LABEL)
        logits = engine.forward(to_device(batch["inputs"], world.device), is_last)
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED_LABEL)
        engine.backward(loss * (world.world_size / step.num_samples), is_last)
        total += loss.detach()
    log.norms.append(engine.step())
    log.losses.append(total / step.num_samples)
    log.steps.append((step, lr))


def _flush(log: StepLog, plan: Plan, world: World, report: Reporter) -> None:
    """Writes the metrics of the steps since the last flush; the only place where training waits for the device."""
    if not log.steps:
        return
    losses = sum_over_ranks(torch.stack(log.losses)).tolist()
    norms = [float(n) for n in log.norms]
    elapsed = time.perf_counter() - log.started_s
    samples = sum(step.num_samples for step, _ in log.steps)
    for (step, lr), loss, norm in zip(log.steps, losses, norms, strict=True):
        if not all_finite([loss, norm]):
            raise TrainingError(
                f"step {step.step + 1}: train/loss is {loss}, train/grad_norm is {norm}. Lower train.lr (now {lr:.3g}), "
                "raise train.warmup, or use train.precision=fp32"
            )
        report.log(
            step.step + 1,
            {
                "train/loss": loss,
                "train/lr": lr,
                "train/grad_norm": norm,
                "perf/samples_per_s": samples / elapsed,
                "perf/step_s": elapsed / len(log.steps),
                "progress/epoch": (step.step + 1) / plan.batches.steps_per_epoch,
                "progress/samples": _samples_after(step.step + 1, plan),
            },
        )
    log.losses.clear(), log.norms.clear(), log.steps.clear()
    log.started_s = time.perf_counter()


def _samples_after(steps: int, plan: Plan) -> int:
    epochs, rest = divmod(steps, plan.batches.steps_per_epoch)
    return epochs * plan.data.num_rows["train"] + rest * plan.batches.global_batch_size


def require_gradients(model: nn.Module, batch: Batch, world: World) -> None:
    """One dry pass of one batch on the unsharded model: every trainable parameter must get a gradient, on every rank.

    In eval mode, so that neither random numbers nor running statistics move. Raises UserError that names the parameters
    outside the loss, which DDP would answer with "Expected to have finished reduction" (pytorch#43259).
    """
    model.eval()
    logits = forward_logits(model, batch["inputs"])
    nn.functional.cross_entropy(logits.float(), batch["labels"], reduction="sum").backward()
    unused = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    model.zero_grad(set_to_none=True)
    unused = sorted({name for names in gather_objects(unused) for name in names})
    if unused:
        shown = ", ".join(unused[:5]) + (f" and {len(unused) - 5} more" if len(unused) > 5 else "")
        raise UserError(
            f"{len(unused)} trainable parameters have no part in the loss: {shown}. "
            f"They would never be updated; freeze them: freeze.patterns=[{', '.join(unused[:5])}]"
        )
