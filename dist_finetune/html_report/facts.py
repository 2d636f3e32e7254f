"""The numbers of a run as its page shows them: short for the reader, and whole beside it."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from dist_finetune.html_report.figures import short_count
from dist_finetune.html_report.predictions import Confusion
from dist_finetune.html_report.record import RunRecord
from dist_finetune.tasks.names import inputs_in_words, outputs_in_words

SHOWN_CLASSES = 24  # a wider table is no longer read
SHOWN_WORST = 30
SECONDS = {"cache_s": "filling the cache, s", "train_s": "training, s", "total_s": "last attempt in all, s"}
MACHINE = ("started", "host", "platform", "num_cpus", "python")
NONE = "-"
SMALL = 0.001


@dataclass(frozen=True)
class Fact:
    """A number or word with a label; `value` is what the files hold, where `text` is rounded."""

    label: str
    text: str
    value: Any = None
    note: str = ""


@dataclass(frozen=True)
class Comparison:
    """One kind of number as planned and as it came."""

    label: str
    planned: Fact | None
    actual: Fact | None
    difference: str = ""


@dataclass(frozen=True)
class PhaseParts:
    """A phase's frozen and trainable parameters, for each part of the model."""

    name: str
    parts: tuple[tuple[str, int, int], ...]

    @property
    def frozen(self) -> int:
        return sum(frozen for _, frozen, _ in self.parts)

    @property
    def trainable(self) -> int:
        return sum(trainable for _, _, trainable in self.parts)


def headline(record: RunRecord) -> list[Fact]:
    """What a reader wants first."""
    summary, (name, before, after) = record.summary, record.headline
    tiles = []
    if after is not None or before is not None:
        arrow = f"{_score(before)} → {_score(after)}"
        tiles.append(Fact(f"validation {name}", arrow, after, "before → after training"))
    test = summary.get("metrics", {}).get(f"test/{name}")
    if test is not None:
        tiles.append(Fact(f"test {name}", _score(test), test))
    planned = record.plan.get("total_steps")
    of_planned = f"of {planned:,} planned" if planned else ""
    tiles.append(Fact("optimizer steps", f"{record.steps:,}", record.steps, of_planned))
    tiles.append(Fact("training time", duration(record.train_s), record.train_s, _total(summary)))
    if record.samples_per_s:
        tiles.append(Fact("samples a second", f"{record.samples_per_s:,.1f}", record.samples_per_s, "while training"))
    verified = summary.get("num_frozen_tensors_verified")
    if verified is not None:
        note = "bit-identical at the end, by name" if verified else "nothing was frozen at the end"
        tiles.append(Fact("frozen tensors verified", f"{verified:,}", verified, note))
    else:
        tiles.append(Fact("frozen tensors verified", "not yet", None, "that is done as a run finishes"))
    return tiles


def run_facts(record: RunRecord) -> list[Fact]:
    """Model, data, batch, strategy: the decisions of the plan."""
    plan = record.plan
    data, batches, topology, card = (plan.get(key, {}) for key in ("data", "batches", "topology", "card"))
    source = record.freeze.get("source") or {}
    rows = ", ".join(f"{count:,} {split}" for split, count in data.get("num_rows", {}).items())
    size = inputs_in_words(data.get("modality"), data.get("max_length"), data.get("image_size"))
    world_size = topology.get("num_nodes", 1) * topology.get("processes_per_node", 1)
    facts = [
        Fact(
            "model",
            str(card.get("name")),
            note=f"{card.get('modality')}, {outputs_in_words(record.task, data.get('classes', ()))}",
        ),
        Fact("weights", str(source.get("sha256") or "unknown")[:16], source.get("sha256"), _files(source)),
        Fact("data", f"{rows} rows", note=f"{size}; fingerprint {str(data.get('fingerprint'))[:16]}"),
        Fact(
            "batch",
            f"{batches.get('global_batch_size')} = {batches.get('micro_batch_size')} x "
            f"{batches.get('gradient_accumulation_steps')} accumulated x {world_size} processes",
            batches.get("global_batch_size"),
        ),
        Fact("precision", f"{plan.get('precision')} on {topology.get('device')}"),
        Fact("strategy", str(plan.get("strategy")), note=str(plan.get("strategy_reason", ""))),
    ]
    if plan.get("skips_unread"):
        facts.append(Fact("head", "reads the first token alone", note="the last block computes no other"))
    phases = plan.get("phases", ())
    done = {phase["name"]: phase for phase in record.summary.get("phases", ())}
    for phase, decision in zip(phases, plan.get("cache", ()), strict=False):
        label = "cache" if len(phases) == 1 else f"cache, {phase['name']}"
        became = done.get(phase["name"], {}).get("cache")
        note = "; in the run: ".join(filter(None, (decision["reason"], became if decision["use"] else None)))
        facts.append(Fact(label, "on" if decision["use"] else "off", note=note))
    return facts


def phase_parts(record: RunRecord) -> list[PhaseParts]:
    """Parameters of each part, from the tensors of freeze.json; the phases that were started, in their order."""
    order = [part["part"] for part in record.plan.get("parts", ())]
    found = []
    for name, phase in record.freeze.get("phases", {}).items():
        counts: dict[str, list[int]] = {part: [0, 0] for part in order}
        for tensor in phase["tensors"]:
            if tensor["kind"] == "parameter":
                counts.setdefault(tensor["part"], [0, 0])[0 if tensor["frozen"] else 1] += tensor["num_elements"]
        parts = tuple((part, frozen, trainable) for part, (frozen, trainable) in counts.items())
        found.append(PhaseParts(name, tuple(part for part in parts if part[1] or part[2])))
    return found


def planned_and_actual(record: RunRecord) -> list[Comparison]:
    """Bytes of the rank with most, trainable parameters, steps and seconds: as planned, and as they came."""
    memory = record.summary.get("memory") or {}
    planned, actual = memory.get("planned") or {}, memory.get("actual") or {}
    if not memory:
        state = record.plan.get("memory", {}).get(record.plan.get("strategy"), {}).get("state", {})
        planned = {kind: count for kind, count in state.items() if kind not in ("communication", "update", "padding")}
    rows = [
        _compared(f"{kind.replace('_', ' ')}, MiB a rank", planned.get(kind), actual.get(kind), 2**20)
        for kind in planned
        if planned.get(kind) or actual.get(kind)
    ]
    phases, done = record.plan.get("phases", ()), phase_parts(record)
    for phase, parts in zip(phases, done, strict=False):
        label = "trainable parameters" if len(phases) == 1 else f"trainable parameters, {parts.name}"
        rows.append(_compared(label, phase["manifest"]["num_trainable"], parts.trainable))
    rows.append(_compared("optimizer steps", record.plan.get("total_steps"), record.steps))
    for key, label in SECONDS.items():
        if key in record.summary:
            rows.append(Comparison(label, None, _number(record.summary[key])))
    forecast = (record.plan.get("costs") or {}).get("forecast")
    if forecast:
        rows.append(Comparison("speed-up over the unfrozen run, in operations", _number(forecast["speedup"]), None))
    return rows


def memory_note(record: RunRecord) -> str:
    """Why less can be held than planned."""
    actual = (record.summary.get("memory") or {}).get("actual") or {}
    if any(decision["use"] for decision in record.plan.get("cache", ())) and actual:
        return "The cache was on: ranks then hold nothing of the frozen part whose activations are stored."
    return ""


def attempts(record: RunRecord) -> list[dict[str, Any]]:
    """The starts of the run: from which step, when, where, and the seconds since the last step that counts."""
    rows = []
    for start in record.starts:
        before = record.metrics.times[record.metrics.times < start["time"]]
        gap = duration(start["time"] - before.max()) if len(before) and start["attempt"] > 1 else ""
        place = f"{start.get('strategy')} x {start.get('world_size')} from {start.get('host')}"
        rows.append({**start, "began": clock(start["time"]), "gap": gap, "place": place})
    return rows


def class_rows(confusion: Confusion) -> list[dict[str, Any]]:
    """For each class its rows, how many were right, and what it was mostly taken for; the worst first."""
    rows = []
    for number, name in enumerate(confusion.classes):
        counts = confusion.counts[number]
        total, right = int(counts.sum()), int(counts[number])
        wrong = counts.copy()
        wrong[number] = 0
        other = int(wrong.argmax())
        mistake = f"{confusion.classes[other]} ({int(wrong[other])})" if wrong[other] else ""
        share = right / total if total else None
        rows.append({"name": name, "total": total, "right": right, "share": share, "mistake": mistake})
    return sorted(rows, key=lambda row: (row["share"] is None, row["share"] or 0.0))


def environment_facts(record: RunRecord) -> list[Fact]:
    """Versions, machine and launcher variables of the last attempt."""
    environment = record.environment
    facts = [Fact(key.replace("_", " "), str(environment[key])) for key in MACHINE if key in environment]
    facts += [Fact(name, str(version)) for name, version in environment.get("packages", {}).items() if version]
    return facts + [Fact(name, str(value)) for name, value in environment.get("variables", {}).items()]


def duration(seconds: float) -> str:
    """12.3 s, 4.5 min, 6.7 h."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def clock(when: float | None) -> str:
    """A point in time as this machine's clock shows it."""
    return time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(when)).strip() if when else ""


def _compared(label: str, planned: float | None, actual: float | None, unit: float = 1) -> Comparison:
    difference = ""
    if planned and actual is not None:
        share = (actual - planned) / planned
        difference = "equal" if not share else f"{share:+.1%}" if abs(share) >= SMALL else f"below {SMALL:.1%}"
    return Comparison(label, _number(planned, unit), _number(actual, unit), difference)


def _number(value: float | None, unit: float = 1) -> Fact | None:
    if value is None:
        return None
    text = f"{value / unit:,.2f}" if unit != 1 or isinstance(value, float) else f"{value:,}"
    return Fact("", text, value)


def _score(value: float | None) -> str:
    return NONE if value is None else f"{value:.3f}"


def _total(summary: dict[str, Any]) -> str:
    total = summary.get("total_s")
    return f"of {duration(total)} in all" if total is not None else ""


def _files(source: dict[str, Any]) -> str:
    commit = f", commit {source['revision'][:12]}" if source.get("revision") else ""
    return f"sha256 of {_listed(source.get('files') or ['its tensors'])}{commit}"


def _listed(names: Iterable[str], most: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def frozen_words(phases: list[PhaseParts]) -> list[Fact]:
    """What each phase froze, in words."""
    facts = []
    for phase in phases:
        share = phase.frozen / max(1, phase.frozen + phase.trainable)
        text = f"{phase.frozen:,} frozen ({share:.1%}), {phase.trainable:,} trainable"
        facts.append(Fact(phase.name, text, phase.frozen, short_count(phase.frozen + phase.trainable)))
    return facts
