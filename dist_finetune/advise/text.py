"""Advice as people read it: a table, a config, a plot of probe accuracy by depth."""

from collections.abc import Mapping
from io import StringIO
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Group, RenderableType
from rich.table import Table
from ruamel.yaml import YAML

from dist_finetune.advise.costs import Cost, merged
from dist_finetune.advise.probes import Evidence
from dist_finetune.advise.situation import Verdict
from dist_finetune.features.results import Z_95, save_figure
from dist_finetune.spec import Spec
from dist_finetune.spec_file import resolved_yaml

NAMES = {
    "features-last": "last features, linear head",
    "features-best": "best depth's features, linear head",
    "fine-tune-top": "head, then the upper half",
    "fine-tune-all": "head, then everything",
}


def render_advice(evidence: Evidence, verdict: Verdict, costs: Mapping[str, Cost], folder: Path) -> RenderableType:
    """The probes, the situation with its reasons, the four choices with their costs, the config block."""
    probes = Table(title=f"linear probes on {evidence.num_sampled:,} rows", title_justify="left")
    probes.add_column("depth", no_wrap=True)
    for column in ("accuracy", "+-", "LogME"):
        probes.add_column(column, justify="right")
    for probe in evidence.probes:
        cells = (f"{probe.accuracy:.3f}", f"{Z_95 * probe.standard_error:.3f}", f"{probe.logme:.3f}")
        probes.add_row(probe.depth, *cells, style="bold" if probe == evidence.best else None)
    table = Table(title="what each choice costs here", title_justify="left")
    table.add_column("choice")
    for column in ("state a rank, MiB", "time"):
        table.add_column(column, justify="right")
    for name, cost in costs.items():
        style = "bold" if name == verdict.choice else None
        table.add_row(NAMES[name], f"{cost.state_bytes / 2**20:,.0f}", _time(cost.seconds), style=style)
    lines = [f"situation: {verdict.situation}", *(f"  {reason}" for reason in verdict.reasons)]
    lines += [f"advice: {NAMES[verdict.choice]}", "", config_block(verdict).rstrip(), ""]
    lines += [f"whole config: {folder / 'advice.yaml'}, plot: {folder / 'advice.svg'}"]
    return Group(probes, table, "\n".join(lines))


def config_block(verdict: Verdict) -> str:
    """The part of a config that the advice is, as YAML."""
    out = StringIO()
    yaml = YAML()
    yaml.default_flow_style = None
    yaml.dump(verdict.config, out)
    return out.getvalue()


def ready_yaml(spec: Spec, verdict: Verdict) -> str:
    """The whole config with the advice in it, and the reasons above."""
    reasons = "".join(f"# {line}\n" for line in (f"{verdict.situation}: {verdict.choice}", *verdict.reasons))
    return reasons + resolved_yaml(merged(spec, verdict.config))


def plot_probes(evidence: Evidence, title: str, path: Path) -> None:
    """Writes an SVG: probe accuracy with 95 % intervals, and LogME, by depth."""
    labels = [probe.depth for probe in evidence.probes]
    places = range(len(labels))
    figure = Figure(figsize=(1.5 + 0.75 * max(5, len(labels)), 4), layout="constrained")
    accuracy = figure.subplots()
    spread = [Z_95 * probe.standard_error for probe in evidence.probes]
    values = [probe.accuracy for probe in evidence.probes]
    line = accuracy.errorbar(places, values, yerr=spread, marker="o", capsize=3, label="probe accuracy")
    accuracy.axhline(evidence.majority_share, color="grey", linestyle=":", label="largest class")
    score = accuracy.twinx()
    (other,) = score.plot(places, [probe.logme for probe in evidence.probes], "s--", color="C1", label="LogME")
    accuracy.set(title=title, ylabel="cross-validated accuracy")
    accuracy.set_xticks(places, labels, rotation=45 if len(labels) > 8 else 0)
    score.set_ylabel("LogME")
    accuracy.legend(handles=[line, other], loc="lower right")
    accuracy.grid(alpha=0.3)
    save_figure(figure, path)


def _time(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
