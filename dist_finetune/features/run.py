"""One feature run on one page: extract, fit heads, compare, fold the best into a model."""

import time
from collections.abc import Sequence
from dataclasses import replace

from dist_finetune.features.bare import refuse_idle_settings
from dist_finetune.features.files import (
    FeatureSummary,
    Found,
    best_of,
    load_feature_summary,
    write_heads,
    write_start_files,
)
from dist_finetune.features.heads import MAX_EXACT_ROWS, fit_head, heads_for
from dist_finetune.features.job import (
    ExtractionCost,
    FeatureJob,
    class_tables,
    extract_all,
    prepare_features,
)
from dist_finetune.features.keep import keep_models
from dist_finetune.features.minibatch import fit_minibatch
from dist_finetune.features.results import HeadResult, head_result, render_results
from dist_finetune.features.room import available_bytes, fits
from dist_finetune.hold import Hold
from dist_finetune.html_report.at_end import write_page
from dist_finetune.no_memory import FEWER_ROWS
from dist_finetune.report import Reporter, require_trackers
from dist_finetune.run_folder import Changes, folder_of, resume_command, start_run_folder, write_json
from dist_finetune.signals import StopSignals
from dist_finetune.spec import Spec
from dist_finetune.spec_features import HeadKind
from dist_finetune.stopping import Interrupted, Stopped, StopWish
from dist_finetune.summary import in_run_folder
from dist_finetune.world import World, gather_objects, join_world, on_first, together


def compare_heads(spec: Spec, fresh: bool = False, changes: Changes = "none") -> FeatureSummary:
    """Runs `task: features` as one rank of the job it finds itself in, and returns the summary.

    An interrupted run goes on with the features it has; `changes` says what may differ from its config. Raises
    DistFinetuneError; every rank raises, none waits.
    """
    started_s = time.perf_counter()
    refuse_idle_settings(spec)
    with join_world(spec.launch) as world:
        folder, report = folder_of(spec), Reporter(world.is_first)
        with in_run_folder(spec, fresh, changes, world, report, FEWER_ROWS) as (found, hold):
            if found == "finished":
                report.say(f"{folder} is finished; --fresh runs it again")
                return load_feature_summary(folder)
            return _run(spec, fresh, world, report, hold, started_s)


def _run(spec: Spec, fresh: bool, world: World, report: Reporter, hold: Hold, started_s: float) -> FeatureSummary:
    folder = folder_of(spec)
    on_first(world, lambda: require_trackers(spec.track))
    report.say(f"reading {', '.join(spec.data.train)}")
    tables = class_tables(spec, "task: features", world)
    report.notes(tables.notes)
    kinds, notes = heads_for(spec.features.heads, len(tables.train))
    report.notes(notes)
    job = prepare_features(spec, tables, folder, world, report)
    on_first(world, lambda: start_run_folder(spec, fresh, 0, True, hold))
    on_first(world, lambda: write_start_files(job))
    report.open_files(folder)
    on_first(world, lambda: report.open_trackers(spec, folder, spec.model_dump(mode="json", by_alias=True), 0))
    cost = _extract(job, started_s)
    report.say(f"{cost.num_rows:,} rows extracted, {cost.samples_per_s:.1f} a second, in {job.store.folder}")
    found = fit_heads(job, kinds)
    results = tuple(result for _, result in found)
    best = best_of(found)[1]
    on_first(world, hold.require)
    on_first(world, lambda: write_heads(job, found, best))
    kept = keep_models(job, found)
    summary = FeatureSummary(
        folder=folder,
        status="finished",
        metrics=_metrics(best),
        best=best,
        folded=kept.folded,
        folded_note=kept.note,
        num_rows_predicted_alike=kept.num_equal,
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
    report.say(f"model/    {kept.note}\nplot      {folder / 'features.svg'}")
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
                f"stopped on {reason}; what is extracted is kept. Go on with: {resume_command(job.folder)}"
            ) from None
        stop.settle()
    return cost


def fit_heads(job: FeatureJob, kinds: Sequence[HeadKind]) -> list[Found]:
    """Every head at every depth with its result, in the order of depths; fits are dealt over the ranks. Collective.

    scikit-learn's estimator comes with the best RBF SVM alone.
    """
    num_rows = job.splits["train"].num_rows
    tasks = [(depth.label, kind) for depth in job.depths for kind in kinds]
    mine = tasks[job.world.rank :: job.world.world_size]
    done = together(lambda: [_fit(job, depth, kind, num_rows) for depth, kind in mine])
    own = {(fit.depth, fit.kind): fit.estimator for fit, _ in done}
    light = [(replace(fit, estimator=None), result) for fit, result in done]
    by_task = {(fit.depth, fit.kind): (fit, result) for part in gather_objects(light) for fit, result in part}
    found = [by_task[task] for task in tasks]
    # Of all RBF SVMs, each with its support vectors, only the best is kept or run again.
    kernels = [pair for pair in found if pair[0].linear is None]
    if not kernels:
        return found
    best, result = best_of(kernels)
    key = (best.depth, best.kind)
    estimator = next(each for each in gather_objects(own.get(key)) if each is not None)
    return [(replace(best, estimator=estimator), result) if pair[0] is best else pair for pair in found]


def _fit(job: FeatureJob, depth: str, kind: HeadKind, num_rows: int) -> Found:
    weight, seed = job.plan.spec.features.class_weight, job.plan.spec.train.seed
    num_features = job.store.shard("train", 0, depth)[1].shape[1]
    is_small = kind == "rbf-svm" or fits(num_rows, num_features, job.world.local_world_size, available_bytes())
    if num_rows > MAX_EXACT_ROWS or not is_small:
        fit = fit_minibatch(kind, depth, job.store, num_rows, job.num_classes, weight, seed)
    else:
        features, labels = job.store.read("train", depth, num_rows)
        fit = fit_head(kind, depth, features, labels, job.num_classes, weight, seed)
    job.report.say(f"{depth} {kind}: cross-validated accuracy {fit.cv_accuracy:.3f}, {fit.fit_s:.1f} s")
    return fit, head_result(fit, job.store, num_features, "test" in job.splits)


def _metrics(best: HeadResult) -> dict[str, float]:
    test = {} if best.test_accuracy is None else {"test/accuracy": best.test_accuracy}
    return {"eval/accuracy": best.accuracy} | test
