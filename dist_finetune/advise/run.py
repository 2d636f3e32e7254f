"""One advice on one page: sample, extract, probe, judge, price; and the spec that follows it."""

import dataclasses
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_finetune.advise.costs import Cost, cost_of, merged
from dist_finetune.advise.probes import Evidence, depth_words, measure, sample_tables
from dist_finetune.advise.situation import Verdict, choices, judge
from dist_finetune.advise.text import plot_probes, ready_yaml, render_advice
from dist_finetune.data.arrow import column_values
from dist_finetune.data.tables import Tables
from dist_finetune.errors import UserError
from dist_finetune.features.depths import head_linear
from dist_finetune.features.job import FeatureJob, class_tables, extract_all, prepare_features
from dist_finetune.models.on_meta import on_meta
from dist_finetune.models.order import structure_for
from dist_finetune.models.sources import build_model, describe_model
from dist_finetune.no_memory import FEWER_ROWS, lack_of_memory_told
from dist_finetune.report import Reporter
from dist_finetune.run_folder import output_of, write_json, write_text
from dist_finetune.spec import CacheSpec, Spec
from dist_finetune.spec_features import FeaturesSpec
from dist_finetune.topology import job_topology
from dist_finetune.world import World, join_world, on_first


@dataclass(frozen=True)
class Advice:
    """What was measured, what follows, and what each of the four choices costs; advice.json in `folder`."""

    folder: Path
    evidence: Evidence
    verdict: Verdict
    costs: dict[str, Cost]
    total_s: float

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {**dataclasses.asdict(self), "folder": str(self.folder)}


def advise(spec: Spec) -> Advice:
    """Measures the data of `spec` with its model and says what to do, as one rank of the job it finds itself in.

    Writes <output>/<name>-advise: advice.json, advice.yaml (the config with the advice in it), advice.svg.
    """
    with join_world(spec.launch) as world:
        return _advise(spec, world, Reporter(world.is_first))


def follow_advice(spec: Spec) -> Spec:
    """`spec` (which has `strategy: auto`) as measured advice completes it. Advice that its folder holds counts on.

    Raises UserError where the spec decides already what advice is asked to decide. Collective.
    """
    decided = [
        key
        for key, is_set in {
            "freeze": not spec.freeze.is_none(),
            "phases": bool(spec.phases),
            "task: features": spec.task == "features",
        }.items()
        if is_set
    ]
    if decided:
        raise UserError(
            f"strategy: auto chooses what to freeze and train, but {' and '.join(decided)} is set; keep one"
        )
    with join_world(spec.launch) as world:
        report = Reporter(world.is_first)
        part = on_first(world, lambda: _earlier(spec))
        if part is None:
            part = _advise(spec, world, report).verdict.config
        else:
            report.say(f"strategy: auto goes by {advice_folder(spec) / 'advice.json'}")
        return merged(spec, part)


def advice_folder(spec: Spec) -> Path:
    """<output>/<name>-advise."""
    return output_of(spec) / f"{spec.name}-advise"


def _advise(spec: Spec, world: World, report: Reporter) -> Advice:
    started_s = time.perf_counter()
    report.say(f"reading {', '.join(spec.data.train)}")
    tables = class_tables(spec, "advice", world)
    labels = column_values(tables.train, "label")
    sampled = sample_tables(tables, spec.train.seed)
    with lack_of_memory_told(world, FEWER_ROWS):
        job = _prepare(spec, sampled, world, report)
        report.say(
            f"probing {len(job.depths)} depths of {spec.model.name} with {len(sampled.train):,} of {len(labels):,} rows"
        )
        # Features of earlier advice would take no time to extract, and the time of a row is part of the evidence.
        on_first(world, lambda: shutil.rmtree(job.folder / "features", ignore_errors=True))
        evidence = measure(job, labels, extract_all(job))
    verdict = judge(evidence, job.plan.structure, job.plan.card.default_lr)
    costs = _price(spec, evidence, job, tables, world)
    advice = Advice(job.folder, evidence, verdict, costs, round(time.perf_counter() - started_s, 2))
    on_first(world, lambda: _write(advice, spec))
    report.say(render_advice(evidence, verdict, costs, job.folder))
    return advice


def _prepare(spec: Spec, sampled: Tables, world: World, report: Reporter) -> FeatureJob:
    card = describe_model(spec.model, spec.data.image_size)
    with on_meta():
        model = build_model(card, spec.model, sampled.classes)
    structure = structure_for(model, card)
    words = depth_words(structure.depth)
    if head_linear(structure, model) is None:
        words = words[:-1]
    probed = spec.model_copy(update={"features": FeaturesSpec(at=words, pool=spec.features.pool)})
    job = prepare_features(probed, sampled, advice_folder(spec), world, report)
    return dataclasses.replace(job, splits={"train": job.splits["train"]})


def _price(spec: Spec, evidence: Evidence, job: FeatureJob, tables: Tables, world: World) -> dict[str, Cost]:
    topology = job_topology(world)
    options = choices(evidence, job.plan.structure, job.plan.card.default_lr)
    bare = spec.model_copy(update={"cache": CacheSpec(mode="off")})
    return {name: cost_of(part, bare, evidence, topology, tables) for name, part in options.items()}


def _write(advice: Advice, spec: Spec) -> None:
    content = advice.to_json() | {"asked": _asked(spec)}
    write_json(advice.folder / "advice.json", content)
    write_text(advice.folder / "advice.yaml", ready_yaml(spec, advice.verdict))
    plot_probes(advice.evidence, f"{spec.model.name}: {advice.verdict.situation}", advice.folder / "advice.svg")


def _asked(spec: Spec) -> str:
    """Model, data and pooling of a spec: advice on others is no advice for this one."""
    model, data = spec.model.model_dump(mode="json"), spec.data.model_dump(mode="json")
    return json.dumps([model, data, spec.train.seed, spec.features.pool])


def _earlier(spec: Spec) -> dict[str, Any] | None:
    """The config part of advice that was given before on the same model and data; None where its file is damaged."""
    path = advice_folder(spec) / "advice.json"
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        part: dict[str, Any] = content["verdict"]["config"]
        return part if content["asked"] == _asked(spec) else None
    except (ValueError, KeyError, TypeError):
        return None
