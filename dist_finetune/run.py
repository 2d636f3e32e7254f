"""One run on one page: the stages in order, as every rank goes through them."""

import time
from functools import partial

from dist_finetune.cache.tokens import encode_once
from dist_finetune.checkpoint.resume import find_start
from dist_finetune.checkpoint.saver import Saver
from dist_finetune.data.tables import Tables
from dist_finetune.data.together import read_tables_together
from dist_finetune.finish import finish_run
from dist_finetune.hold import Hold
from dist_finetune.job import Job
from dist_finetune.launchers.brought import refuse_launcher_settings
from dist_finetune.models.sources import load_tokenizer
from dist_finetune.no_memory import needs_less
from dist_finetune.plan import Plan, plan_run, with_micro_batch
from dist_finetune.plan_text import plan_lines, plan_notes, room_notes
from dist_finetune.proof import verify_frozen
from dist_finetune.report import Reporter, require_trackers
from dist_finetune.run_folder import Changes, folder_of, start_run_folder
from dist_finetune.signals import StopSignals
from dist_finetune.spec import Spec
from dist_finetune.stage import load_base, next_stage, open_stage
from dist_finetune.stopping import StopWish, refuse_if_told, stop_if_told
from dist_finetune.summary import Summary, in_run_folder, load_summary, write_end, write_freeze, write_start
from dist_finetune.topology import job_topology
from dist_finetune.training import fit
from dist_finetune.trial import tried_micro_batch
from dist_finetune.watchdog import Watchdog
from dist_finetune.world import World, join_world, on_first, require_same, require_same_versions, together


def train(spec: Spec, fresh: bool = False, changes: Changes = "none") -> Summary:
    """Trains as one rank of the job it finds itself in (alone: a job of one), and returns the run's summary.

    An unfinished run goes on from its newest good checkpoint, a finished one is not trained again; `changes` says what
    may differ from the config it was started with. Raises DistFinetuneError; every rank raises, none waits.
    """
    started_s = time.perf_counter()
    with StopSignals() as signals, join_world(spec.launch) as world:
        folder, report = folder_of(spec), Reporter(world.is_first)
        todo, between = needs_less(folder), partial(refuse_if_told, signals)
        with in_run_folder(spec, fresh, changes, world, report, todo, between) as (found, hold):
            if found == "finished":
                report.say(f"{folder} is finished; `run` with --fresh trains it again")
                return load_summary(folder)
            return _train(spec, fresh, world, report, signals, hold, started_s)


def _train(
    spec: Spec, fresh: bool, world: World, report: Reporter, signals: StopSignals, hold: Hold, started_s: float
) -> Summary:
    """Plan; then for each phase load, freeze, optimizer, shard, train, prove; then save what came of it."""
    job = _prepare(spec, world, report, signals)
    plan = job.plan
    stop_if_told(signals)
    model, provenance = load_base(plan, world, report)
    checkpoint, progress = find_start(job, provenance, fresh)
    stop_if_told(signals)
    stage = open_stage(job, plan.phases[progress.phase], checkpoint, model)
    del model  # it is the engine's, which frees it before the next phase
    stop_if_told(signals)
    # every refusal of the user's input lies behind us: only now is anything written
    on_first(world, lambda: start_run_folder(spec, fresh, progress.step, progress.evaluated, hold))
    report.open_files(job.folder)
    on_first(world, lambda: write_start(job, provenance, stage, progress))
    on_first(world, lambda: report.open_trackers(spec, job.folder, plan.to_json(), progress.step))
    report.start_progress(plan.total_steps)
    saver = Saver(job, provenance, progress, hold)
    stop = StopWish(world, signals, job.folder, spec.launch.time_limit, started_s, saver.every_s)
    end = partial(write_end, job.folder, world=world)
    with saver, Watchdog(world, job.folder, spec.launch, lambda: stop.num_calls, end):
        while True:
            last = fit(job, stage, progress, saver, stop)
            verify_frozen(stage.engine, stage.held_digests, world)
            has_next = stage.phase.index + 1 < len(plan.phases)
            progress.end_phase(stage, has_next)
            saver.save(stage, progress)
            if not has_next:
                break
            stage = next_stage(job, stage, progress, saver)
            on_first(world, partial(write_freeze, job, stage))
    return finish_run(job, stage, progress, last, saver, stop, started_s)


def _prepare(spec: Spec, world: World, report: Reporter, signals: StopSignals) -> Job:
    """Everything that needs no weights: data, plan, agreement of ranks and launcher with it, encoded rows."""
    require_same_versions()
    on_first(world, lambda: require_trackers(spec.track))
    report.say(f"reading {', '.join(spec.data.train)}")
    tables = read_tables_together(spec.data, spec.train.seed, spec.label_task, world)
    topology = job_topology(world)
    plan = together(lambda: plan_run(spec, topology, tables))
    if spec.train.micro_batch_size == "auto" and world.device.type == "cuda":
        plan = _tried(plan, tables, world, report)
    require_same("the plan", plan.digest(), "Give every rank the same config, data and package versions.")
    brought = together(
        lambda: refuse_launcher_settings(
            spec,
            plan.strategy,
            plan.precision,
            micro_batch_size=plan.batches.micro_batch_size,
            gradient_accumulation_steps=plan.batches.gradient_accumulation_steps,
            device=plan.topology.device,
        )
    )
    report.say(plan_lines(plan))
    report.notes([*tables.notes, *plan_notes(plan), *room_notes(plan), *brought])
    tokenizer = together(lambda: load_tokenizer(plan.card)) if plan.card.modality == "text" else None
    splits = encode_once(plan, tables, tokenizer, world)
    return Job(plan, world, report, folder_of(spec), splits, tokenizer, signals)


def _tried(plan: Plan, tables: Tables, world: World, report: Reporter) -> Plan:
    """The plan at a micro-batch that has run on every rank: its own, or a smaller one where memory says so."""
    planned = plan.batches.micro_batch_size
    rows, untried = tried_micro_batch(plan, world)
    if untried:
        report.notes([f"micro-batch {rows} is as planned, and was not tried on every rank: {untried}"])
    if rows == planned:
        return plan
    report.notes([f"micro-batch {rows}: the planned {planned} ran out of memory when tried"])
    return together(lambda: with_micro_batch(plan, tables, rows))
