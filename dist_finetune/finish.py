"""The end of a run: the model that is kept, its last evaluation, the export, the summary and the page."""

import time

from dist_finetune.checkpoint.saver import Saver
from dist_finetune.evaluate import Evaluation, all_finite, evaluate
from dist_finetune.html_report.at_end import write_page
from dist_finetune.job import Job, Progress, Stage
from dist_finetune.memory.held import planned_and_actual
from dist_finetune.save import save_model
from dist_finetune.stage import load_base, open_stage
from dist_finetune.stopping import Interrupted, StopWish
from dist_finetune.summary import Summary, summarise
from dist_finetune.summary_text import render_summary
from dist_finetune.training import stopped


def finish_run(
    job: Job,
    stage: Stage,
    progress: Progress,
    last: Evaluation | None,
    saver: Saver,
    stop: StopWish,
    started_s: float,
) -> Summary:
    """Exports the last model (or the best, where `checkpoint.best` asks for it) and writes the summary. Collective.

    Raises Stopped where told to stop while it evaluates; an export that has begun is finished. Raises LostHold where
    the folder is another job's by now.
    """
    saver.settled()
    job.report.stop_progress()
    kept_step = progress.step
    if job.plan.spec.checkpoint.best and progress.best_step != progress.step:
        saved_step = saver.best_step()
        if saved_step != progress.best_step:
            instead = "the last one" if saved_step is None else f"step {saved_step}"
            job.report.say(f"WARNING the best model, of step {progress.best_step}, was not saved; kept is {instead}")
        if saved_step is not None:
            kept_step = saved_step
            stage.engine.close()
            stage, last = _reopen(job, saver, kept_step), None
    batch_size = job.plan.batches.eval_batch_size
    try:
        final = {"validation": last} if last else {}
        for split in [name for name in ("validation", "test") if name in stage.splits and name not in final]:
            stop.new_pace()
            final[split] = evaluate(stage.engine, stage.splits[split], batch_size, job.world, stop.check)
    except Interrupted as interruption:
        stop.settle()
        raise stopped(interruption, job, progress, saver) from None
    stop.settle()
    for name, result in final.items():
        if not all_finite([result.metrics["loss"]]):  # after the last step no training loss would show it
            job.report.say(
                f"WARNING {name} loss of the model that is kept is {result.metrics['loss']}: its last steps spoilt "
                "the weights (a lower train.lr helps), or a row holds what is no number"
            )
    saver.require_hold()
    verified = save_model(job, stage, final)
    total_s = time.perf_counter() - started_s
    plan = job.plan
    planned = plan.costs.by_phase[stage.phase.index][plan.strategy]
    memory = planned_and_actual(planned, plan.memory[plan.strategy].peak, stage.engine, job.world)
    summary = summarise(job, progress, kept_step, final, verified, saver.pauses_s, memory, total_s)
    write_page(job.folder, job.world, job.report)
    job.report.finish(summary.to_json(), exit_code=0)
    job.report.say(render_summary(summary, job.plan.data.task))
    stage.engine.close()
    return summary


def _reopen(job: Job, saver: Saver, step: int) -> Stage:
    """The stage as it was at the checkpoint of `step`."""
    checkpoint = saver.saved_at(step)
    model, _ = load_base(job.plan, job.world, job.report)
    return open_stage(job, job.plan.phases[checkpoint.state["progress"]["phase"]], checkpoint, model)
