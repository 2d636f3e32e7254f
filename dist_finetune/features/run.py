"""One feature run on one page: extract, fit heads, compare, fold the best into a model."""

import time

from dist_finetune.features.depths import HEAD
from dist_finetune.features.files import (
    FeatureSummary,
    Found,
    load_feature_summary,
    write_heads,
    write_start_files,
)
from dist_finetune.features.fold import Agreement, fold_head, fold_problem, verify_folded
from dist_finetune.features.heads import MAX_EXACT_ROWS, HeadFit, fit_head, heads_for
from dist_finetune.features.job import (
    ExtractionCost,
    FeatureJob,
    class_tables,
    extract_all,
    prepare_features,
    refuse_idle_settings,
)
from dist_finetune.features.minibatch import fit_minibatch
from dist_finetune.features.results import HeadResult, head_result, render_results
from dist_finetune.html_report.at_end import write_page
from dist_finetune.models.export import export_model
from dist_finetune.report import Reporter
from dist_finetune.run_folder import Changes, check_run_folder, folder_of, start_run_folder, write_json
from dist_finetune.signals import StopSignals
from dist_finetune.spec import Spec
from dist_finetune.spec_features import HeadKind
from dist_finetune.stopping import Interrupted, Stopped, StopWish
from dist_finetune.summary import write_end
from dist_finetune.world import World, gather_objects, join_world, on_first, together


def compare_heads(spec: Spec, fresh: bool = False, changes: Changes = "none") -> FeatureSummary:
    """Runs `task: features` as one rank of the job it finds itself in, and returns the summary.

    An interrupted run goes on with the features it has; `changes` says what may differ from its config. Raises
    DistFinetuneError; every rank raises, none waits.
    """
    started_s = time.perf_counter()
    refuse_idle_settings(spec)
    with join_world(spec.launch) as world:
        report = Reporter(world.is_first)
        folder = folder_of(spec)
        try:
            if on_first(world, lambda: check_run_folder(spec, fresh, changes)) == "finished":
                report.say(f"{folder} is finished; --fresh runs it again")
                return load_feature_summary(folder)
            return _run(spec, fresh, world, report, started_s)
        except Exception as error:
            write_end(folder, "stopped" if isinstance(error, Stopped) else "failed", error, world)
            report.finish({}, exit_code=1)
            raise


def _run(spec: Spec, fresh: bool, world: World, report: Reporter, started_s: float) -> FeatureSummary:
    folder = folder_of(spec)
    report.say(f"reading {', '.join(spec.data.train)}")
    tables = together(lambda: class_tables(spec, "task: features"))
    report.notes(tables.notes)
    job = prepare_features(spec, tables, folder, world, report)
    on_first(world, lambda: start_run_folder(spec, fresh, 0, True))
    on_first(world, lambda: write_start_files(job))
    report.open_files(folder)
    report.open_trackers(spec, folder, spec.model_dump(mode="json", by_alias=True))
    cost = _extract(job, started_s)
    report.say(f"{cost.num_rows:,} rows extracted, {cost.samples_per_s:.1f} a second, in {job.store.folder}")
    found = fit_heads(job)
    results = tuple(result for _, result in found)
    best_fit, best = max(found, key=lambda pair: pair[1].cv_accuracy)
    on_first(world, lambda: write_heads(job, found, best))
    folded, note, agreement = _fold_best(job, found, best_fit)
    summary = FeatureSummary(
        folder=folder,
        status="finished",
        metrics=_metrics(best),
        best=best,
        folded=folded,
        folded_note=note,
        num_rows_predicted_alike=agreement.num_equal if agreement else 0,
        results=results,
        features=str(job.store.folder),
        extracted_rows=cost.num_rows,
        samples_per_s=round(cost.samples_per_s, 2),
        total_s=round(time.perf_counter() - started_s, 3),
        world_size=world.world_size,
    )
    on_first(world, lambda: write_json(folder / "summary.json", summary.to_json()))
    write_page(folder, world, report)
    report.log(0, {f"features/{r.depth.replace(' ', '_')}/{r.head}": r.accuracy for r in results} | summary.metrics)
    report.say(render_results(results, best))
    report.say(f"model/    {note}\nplot      {folder / 'features.svg'}")
    report.finish(summary.to_json(), exit_code=0)
    return summary


def _extract(job: FeatureJob, started_s: float) -> ExtractionCost:
    """Extraction that ends between two shards where the run is told to stop. Raises Stopped, on every rank at once."""
    with StopSignals() as signals:
        stop = StopWish(job.world, signals, job.folder, job.plan.spec.launch.time_limit, started_s, None)
        try:
            cost = extract_all(job, stop.check)
        except Interrupted as reason:
            stop.settle()
            raise Stopped(
                f"stopped on {reason}; what is extracted is kept. Go on with: dist-finetune resume {job.folder}"
            ) from None
        stop.settle()
    return cost


def fit_heads(job: FeatureJob) -> list[Found]:
    """Every head at every depth with its result, in the order of depths; fits are dealt over the ranks. Collective."""
    spec, num_rows = job.plan.spec.features, job.splits["train"].num_rows
    kinds, notes = heads_for(spec.heads, num_rows)
    job.report.notes(notes)
    tasks = [(depth.label, kind) for depth in job.depths for kind in kinds]
    mine = tasks[job.world.rank :: job.world.world_size]
    done = together(lambda: [_fit(job, depth, kind, num_rows) for depth, kind in mine])
    by_task = {(fit.depth, fit.kind): (fit, result) for part in gather_objects(done) for fit, result in part}
    return [by_task[task] for task in tasks]


def _fit(job: FeatureJob, depth: str, kind: HeadKind, num_rows: int) -> Found:
    weight, seed = job.plan.spec.features.class_weight, job.plan.spec.train.seed
    if num_rows > MAX_EXACT_ROWS:
        fit = fit_minibatch(kind, depth, job.store, num_rows, job.num_classes, weight, seed)
    else:
        features, labels = job.store.read("train", depth, num_rows)
        fit = fit_head(kind, depth, features, labels, job.num_classes, weight, seed)
    job.report.say(f"{depth} {kind}: cross-validated accuracy {fit.cv_accuracy:.3f}, {fit.fit_s:.1f} s")
    num_features = job.store.shard("train", 0, depth)[1].shape[1]
    return fit, head_result(fit, job.store, num_features, "test" in job.splits)


def _fold_best(job: FeatureJob, found: list[Found], best: HeadFit) -> tuple[HeadResult | None, str, Agreement | None]:
    """Puts the best linear head that fits the model's own classifier into it, proves it, exports model/. Collective."""
    linear = [pair for pair in found if pair[0].depth == HEAD and pair[0].linear is not None]
    problem = fold_problem(job.plan.structure, job.model, job.num_classes)
    if not linear or problem:
        why = (
            problem or "no linear head was fitted at the depth head (add head to features.at, softmax or svm to heads)"
        )
        return None, f"none: {why}", None
    fit, result = max(linear, key=lambda pair: pair[1].cv_accuracy)
    assert fit.linear is not None
    fold_head(job.plan.structure, job.model, fit.linear)
    agreement = verify_folded(job, fit, "validation")
    state = {name: tensor.detach().cpu() for name, tensor in job.model.state_dict().items()}
    plan = job.plan
    target = job.folder / "model"
    on_first(
        job.world,
        lambda: export_model(plan.card, plan.spec.model, plan.data.classes, state, target, job.tokenizer),
    )
    note = f"{target}: the {fit.kind} head on what the model's own classifier reads, validation {result.accuracy:.3f}"
    if fit is not best:
        note += f" (the best, {best.kind} at {best.depth}, is no part of the model's own shape)"
    return result, note, agreement


def _metrics(best: HeadResult) -> dict[str, float]:
    test = {} if best.test_accuracy is None else {"test/accuracy": best.test_accuracy}
    return {"eval/accuracy": best.accuracy} | test
