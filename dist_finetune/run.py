"""One run on one page: the stages in order, as every rank goes through them."""

import time
from pathlib import Path

from dist_finetune.data.encode import encode_splits
from dist_finetune.data.tables import read_tables
from dist_finetune.engine import open_accelerator, shard
from dist_finetune.evaluate import Evaluation, evaluate
from dist_finetune.freeze import apply_freeze
from dist_finetune.launchers.brought import refuse_launcher_settings
from dist_finetune.models.load import load_model
from dist_finetune.models.sources import load_tokenizer
from dist_finetune.optim import build_optimizer
from dist_finetune.plan import local_topology, plan_run
from dist_finetune.plan_text import plan_lines
from dist_finetune.proof import digest_frozen, verify_frozen
from dist_finetune.report import Reporter
from dist_finetune.run_folder import check_run_folder, create_run_folder, folder_of
from dist_finetune.save import save_model
from dist_finetune.spec import Spec
from dist_finetune.summary import Summary, load_summary, summarise, write_failure, write_start
from dist_finetune.summary_text import render_summary
from dist_finetune.train import fit, require_gradients
from dist_finetune.world import World, join_world, leave_world, on_first, require_same, together


def train(spec: Spec, fresh: bool = False) -> Summary:
    """Trains as one rank of the job it finds itself in (alone: a job of one), and returns the run's summary.

    A run that is finished already is not trained again. Raises DistFinetuneError; every rank raises, none waits.
    """
    world = join_world(spec.launch)
    report = Reporter(world.is_first)
    try:
        if on_first(world, lambda: check_run_folder(spec, fresh)) == "finished":
            report.say(f"{folder_of(spec)} is finished; --fresh trains it again")
            return load_summary(folder_of(spec))
        return _train(spec, fresh, world, report)
    except Exception as error:
        write_failure(folder_of(spec), error, world)
        report.finish({}, exit_code=1)
        raise
    finally:
        leave_world(world)


def _train(spec: Spec, fresh: bool, world: World, report: Reporter) -> Summary:
    """Plan, load, freeze, optimizer, shard, train, prove, save: that order is the contract."""
    started = time.perf_counter()
    report.say(f"reading {', '.join(spec.data.train)}")
    tables = together(lambda: read_tables(spec.data, spec.train.seed))

    plan = plan_run(spec, local_topology(world.local_world_size, world.num_nodes), tables)
    require_same("the plan", plan.digest(), "Give every rank the same config, data and package versions.")
    report.notes(
        refuse_launcher_settings(
            spec,
            plan.strategy,
            plan.precision,
            micro_batch_size=plan.batches.micro_batch_size,
            gradient_accumulation_steps=plan.batches.gradient_accumulation_steps,
            device=plan.topology.device,
        )
    )
    accelerator = open_accelerator(plan, world)

    tokenizer = together(lambda: load_tokenizer(plan.card)) if plan.card.modality == "text" else None
    splits = together(lambda: encode_splits(plan, tables, tokenizer))
    model, provenance = together(lambda: load_model(plan.card, spec.model, plan.data.classes, spec.train.seed))
    apply_freeze(model, plan.manifest)
    at_load = digest_frozen(model, plan.manifest)
    require_gradients(model, splits["train"].first_batch(), world)

    folder: Path = on_first(world, lambda: create_run_folder(spec, fresh))
    report.open_files(folder)
    on_first(world, lambda: write_start(folder, plan, at_load, provenance))
    report.open_trackers(spec, folder, plan.to_json())
    report.say(plan_lines(plan))
    report.notes(note.message for note in plan.notes)
    report.start_progress(plan.batches.total_steps)

    optimizer = build_optimizer(model, plan.groups)
    engine = shard(model, optimizer, plan, accelerator, world)

    def evaluate_at(step: int) -> Evaluation:
        result = evaluate(engine, splits["validation"], plan.batches.eval_batch_size, world)
        report.log(step, {f"eval/{name}": value for name, value in result.metrics.items()})
        return result

    before = evaluate_at(0)
    fitted = fit(engine, splits["train"], plan, world, report, evaluate_at)
    proof = verify_frozen(engine, plan.manifest, at_load, world)
    final = {"validation": fitted.last}
    if "test" in splits:
        final["test"] = evaluate(engine, splits["test"], plan.batches.eval_batch_size, world)
    save_model(engine, plan, tokenizer, final, folder, world)
    seconds = time.perf_counter() - started
    summary = summarise(plan, folder, before.metrics, final, fitted, proof, seconds, report.wandb_mode, world)
    report.finish(summary.to_json(), exit_code=0)
    report.say(render_summary(summary))
    engine.close()
    return summary
