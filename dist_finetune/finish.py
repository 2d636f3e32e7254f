"""The end of a run: the model that is kept, its last evaluation, the export and the summary."""

import time

from dist_finetune.checkpoint.saver import Saver
from dist_finetune.evaluate import Evaluation, evaluate
from dist_finetune.job import Job, Progress
from dist_finetune.proof import FrozenProof, verify_frozen
from dist_finetune.save import save_model
from dist_finetune.stage import Stage, load_base, open_stage
from dist_finetune.summary import Summary, summarise
from dist_finetune.summary_text import render_summary
from dist_finetune.train import evaluate_validation


def finish_run(
    job: Job,
    stage: Stage,
    progress: Progress,
    proof: FrozenProof,
    last: Evaluation | None,
    saver: Saver,
    started_s: float,
) -> Summary:
    """Exports the last model (or the best, where `checkpoint.best` asks for it) and writes the summary. Collective."""
    saver.settled()
    job.report.stop_progress()
    kept_step = progress.step
    if job.plan.spec.checkpoint.best and progress.best_step != progress.step:
        kept_step = progress.best_step
        stage.engine.close()
        stage, proof = _reopen(job, saver, kept_step)
        last = None
    engine = stage.engine
    final = {"validation": last or evaluate_validation(job, engine, progress.step)}
    if "test" in job.splits:
        final["test"] = evaluate(engine, job.splits["test"], job.plan.batches.eval_batch_size, job.world)
    save_model(engine, job.plan, job.tokenizer, final, job.folder, job.world)
    total_s = time.perf_counter() - started_s
    summary = summarise(job, progress, kept_step, final, proof, saver.pauses_s, total_s)
    job.report.finish(summary.to_json(), exit_code=0)
    job.report.say(render_summary(summary))
    engine.close()
    return summary


def _reopen(job: Job, saver: Saver, step: int) -> tuple[Stage, FrozenProof]:
    """The stage of the checkpoint of `step`, and the proof that its frozen tensors are those of the base model."""
    checkpoint = saver.saved_at(step)
    phase = job.plan.phases[checkpoint.state["progress"]["phase"]]
    model, _ = load_base(job.plan)
    stage = open_stage(job, phase, checkpoint, model)
    return stage, verify_frozen(stage.engine, phase.manifest, stage.frozen_digests, job.world)
