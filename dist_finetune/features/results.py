"""What the heads are worth: accuracy on rows they have not seen, with its confidence interval, as table and plot."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from dist_finetune.features.heads import HeadFit
from dist_finetune.features.store import Store
from dist_finetune.spec_features import HeadKind

Z_95 = 1.959964


@dataclass(frozen=True)
class HeadResult:
    """One line of the table. `low` and `high` bound the validation accuracy with 95 % confidence."""

    depth: str
    head: HeadKind
    accuracy: float
    low: float
    high: float
    test_accuracy: float | None
    cv_accuracy: float
    regularisation: float
    fit_s: float
    converged: bool
    num_features: int


def head_result(fit: HeadFit, store: Store, num_features: int, with_test: bool) -> HeadResult:
    """Evaluates a head on the stored features of the validation rows, and of the test rows where there are any."""
    right, total = num_right(fit, store, "validation")
    test = num_right(fit, store, "test") if with_test else None
    low, high = wilson_interval(right, total)
    return HeadResult(
        depth=fit.depth,
        head=fit.kind,
        accuracy=right / total,
        low=low,
        high=high,
        test_accuracy=test[0] / test[1] if test else None,
        cv_accuracy=fit.cv_accuracy,
        regularisation=fit.regularisation,
        fit_s=round(fit.fit_s, 3),
        converged=fit.converged,
        num_features=num_features,
    )


def num_right(fit: HeadFit, store: Store, split: str) -> tuple[int, int]:
    """Rows of a split that the head gets right, and all its rows; a shard at a time."""
    right = total = 0
    for _, features, labels in store.shards(split, fit.depth):
        right += int(np.sum(fit.scores(features).argmax(1) == labels))
        total += len(labels)
    return right, total


def wilson_interval(num_right: int, num_rows: int) -> tuple[float, float]:
    """The 95 % confidence interval of an accuracy (Wilson 1927), which stays inside 0 to 1 on few rows."""
    share = num_right / num_rows
    spread = Z_95 * np.sqrt(share * (1 - share) / num_rows + (Z_95 / (2 * num_rows)) ** 2)
    centre = share + Z_95**2 / (2 * num_rows)
    scale = 1 + Z_95**2 / num_rows
    return float(max(0.0, (centre - spread) / scale)), float(min(1.0, (centre + spread) / scale))


def render_results(results: Sequence[HeadResult], best: HeadResult) -> Table:
    """A table of depth x head; the best by cross-validation in bold."""
    table = Table(title="heads on fixed features", title_justify="left")
    has_test = any(result.test_accuracy is not None for result in results)
    table.add_column("depth", no_wrap=True)
    table.add_column("head", no_wrap=True)
    for name in ("validation", "95 %", *(["test"] if has_test else []), "cross-val.", "C", "fit s"):
        table.add_column(name, justify="right", no_wrap=True)
    for result in results:
        cells = [result.depth, result.head, f"{result.accuracy:.3f}", f"{result.low:.3f}-{result.high:.3f}"]
        cells += [f"{result.test_accuracy:.3f}"] if result.test_accuracy is not None else []
        unsettled = "" if result.converged else "*"
        cells += [f"{result.cv_accuracy:.3f}", f"{result.regularisation:g}{unsettled}", f"{result.fit_s:.1f}"]
        table.add_row(*cells, style="bold" if result == best else None)
    if not all(result.converged for result in results):
        table.caption = "* the solver reached its limit of iterations"
    return table


def plot_results(results: Sequence[HeadResult], depths: Sequence[str], title: str, path: Path) -> None:
    """Writes an SVG: validation accuracy by depth, a line for each head, with confidence intervals and fit seconds."""
    figure = Figure(figsize=(1.5 + 0.75 * max(4, len(depths)), 5.2), layout="constrained")
    accuracy, seconds = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    places = {depth: i for i, depth in enumerate(depths)}
    kinds = list(dict.fromkeys(result.head for result in results))
    for number, kind in enumerate(kinds):
        mine = [result for result in results if result.head == kind]
        shift = 0.08 * (number - (len(kinds) - 1) / 2)
        at = [places[result.depth] + shift for result in mine]
        values = np.array([result.accuracy for result in mine])
        spread = [values - [result.low for result in mine], [result.high for result in mine] - values]
        accuracy.errorbar(at, values, yerr=np.maximum(spread, 0), marker="o", capsize=2, linewidth=1, label=kind)
        seconds.plot(at, [max(result.fit_s, 1e-3) for result in mine], marker="o", linewidth=1)
    accuracy.set(title=title, ylabel="validation accuracy")
    accuracy.legend()
    seconds.set(ylabel="fit seconds", yscale="log")
    seconds.set_xticks(range(len(depths)), depths, rotation=45 if len(depths) > 8 else 0)
    for axes in (accuracy, seconds):
        axes.grid(alpha=0.3)
    save_figure(figure, path)


def save_figure(figure: Any, path: Path) -> None:
    """Writes an SVG in which text stays text; the same data gives the same bytes."""
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "dist-finetune"}):
        figure.savefig(path, metadata={"Date": None})
