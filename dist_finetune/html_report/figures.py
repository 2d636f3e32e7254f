"""Plots as SVG text that takes its colours from the page's style sheet, so that it is readable in light and dark."""

import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

# Stand-ins that matplotlib writes and `_to_svg` turns into variables of the style sheet.
INK, GRID, PAPER = "#010a0b", "#020a0b", "#030a0b"
SERIES = tuple(f"#{number:02x}0a0b" for number in range(0x10, 0x18))
FROZEN, TRAINABLE = "#040a0b", "#050a0b"
VARIABLES = {
    INK: "ink", GRID: "grid", PAPER: "paper", FROZEN: "frozen", TRAINABLE: "trainable",
    **{colour: f"series-{number}" for number, colour in enumerate(SERIES)},
}  # fmt: skip
STYLE = {
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # a name with $ in it is no formula
    "font.size": 10,
    "axes.labelsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "legend.frameon": False,
}
PAGE_IN, HALF_PAGE_IN = 10.6, (6.0, 3.2)  # so that letters come out alike on the page
MAX_POINTS = 500
SMOOTHED_FROM = 40  # points, from which on a curve also gets its running mean
LOG_RATIO = 50.0


@dataclass(frozen=True)
class Line:
    """A curve over optimizer steps. `rough` ones are drawn faint under their running mean."""

    label: str
    steps: np.ndarray
    values: np.ndarray
    colour: int
    rough: bool = False
    marker: str = ""


@dataclass(frozen=True)
class Marks:
    """Steps at which a later attempt, or a later phase, starts: vertical lines."""

    resumes: tuple[int, ...] = ()
    phases: tuple[int, ...] = ()


def curves(
    name: str,
    lines: Sequence[Line],
    unit: str,
    marks: Marks = Marks(),
    *,
    may_be_log: bool = False,
    is_share: bool = False,
    log_from: float | None = None,
    legend: bool = True,
) -> str:
    """One plot of lines over optimizer steps as SVG, ids starting with `name`.

    `may_be_log` takes a logarithmic scale where values span much; `log_from` asks for one that starts there; `is_share`
    says that values lie in 0 to 1.
    """
    with _drawing(name):
        figure = Figure(figsize=HALF_PAGE_IN, layout="constrained")
        axes = figure.subplots()
        for line in lines:
            _draw_line(axes, line)
        for step in marks.phases:
            axes.axvline(step, color=INK, linestyle=(0, (6, 3)), linewidth=0.8, alpha=0.6)
        for step in marks.resumes:
            axes.axvline(step, color=INK, linestyle=":", linewidth=1.3, alpha=0.9)
        axes.set(xlabel="optimizer steps", ylabel=unit)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        if log_from is not None:
            axes.set_yscale("log")
            axes.set_ylim(bottom=log_from)
        else:
            _scale(axes, lines, may_be_log, is_share)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _number(value)))
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
        if legend:
            _legend(figure, axes, marks)
        return _to_svg(figure, name)


def frozen_parts(name: str, parts: Sequence[str], phases: Sequence[tuple[str, Sequence[tuple[int, int]]]]) -> str:
    """Parameters of each part of a model, from stem to head: frozen and trainable, for each phase.

    `phases` holds (name, one (frozen, trainable) for each part). Bars show the last phase, and a strip for each phase
    what trains in it: there small parts are as wide as large ones.
    """
    last = f" in {_cut(phases[-1][0])}" if len(phases) > 1 else ""
    with _drawing(name):
        strip_in = 0.28 * len(phases)
        figure = Figure(figsize=(PAGE_IN, 2.7 + strip_in), layout="constrained")
        bars, strips = figure.subplots(2, 1, sharex=True, height_ratios=[2.2, max(0.3, strip_in)])
        places = np.arange(len(parts))
        frozen, trainable = np.array(phases[-1][1], dtype=float).T
        bars.bar(places, frozen, color=FROZEN, label=f"frozen{last}", width=0.8)
        bars.bar(places, trainable, bottom=frozen, color=TRAINABLE, label=f"trainable{last}", width=0.8)
        bars.set(ylabel="parameters", xlim=(-0.6, len(parts) - 0.4))
        bars.set_ylim(0, 1.06 * float((frozen + trainable).max()))
        bars.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
        bars.grid(axis="x", visible=False)
        _draw_strips(strips, phases)
        labels = [_cut(part.removeprefix("block ")) for part in parts]
        is_crowded = max(map(len, labels), default=0) * len(labels) > 150
        strips.set_xticks(places, labels, rotation=45 if is_crowded else 0, ha="right" if is_crowded else "center")
        strips.set_xlabel("part of the model; numbers are blocks")
        figure.legend(*bars.get_legend_handles_labels(), loc="outside upper left", ncols=2)
        return _to_svg(figure, name)


def depth_scores(name: str, depths: Sequence[str], heads: dict[str, list[tuple[str, float, float, float]]]) -> str:
    """Validation accuracy by depth, a line for each head of (depth, accuracy, low, high)."""
    with _drawing(name):
        figure = Figure(figsize=(PAGE_IN, 3.5), layout="constrained")
        axes = figure.subplots()
        for number, (head, points) in enumerate(heads.items()):
            shift = 0.08 * (number - (len(heads) - 1) / 2)
            at = [depths.index(depth) + shift for depth, *_ in points]
            values, low, high = (np.array(column) for column in list(zip(*points, strict=True))[1:])
            spread = [np.maximum(values - low, 0), np.maximum(high - values, 0)]
            colour = SERIES[number % len(SERIES)]
            axes.errorbar(at, values, yerr=spread, marker="o", capsize=2, linewidth=1.2, color=colour, label=head)
        axes.set(ylabel="validation accuracy, 95 % interval", xlabel="depth at which features are taken")
        axes.set_xticks(range(len(depths)), depths, rotation=45 if len(depths) > 8 else 0)
        axes.set_xlim(-0.5, len(depths) - 0.5)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=4)
        return _to_svg(figure, name)


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of the last `window` values (fewer at the start), NaN left out."""
    filled = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
    sums = np.cumsum(np.concatenate([[0.0], filled]))
    counts = np.cumsum(np.concatenate([[0], np.isfinite(values)]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    with np.errstate(invalid="ignore"):
        return (sums[ends] - sums[starts]) / (counts[ends] - counts[starts])


def smoothing_window(num_points: int) -> int:
    """Points that a curve's running mean takes together; 1 for a short curve."""
    return max(2, num_points // 30) if num_points >= SMOOTHED_FROM else 1


def short_count(value: float) -> str:
    """1234567 as 1.23M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def _draw_strips(axes: Axes, phases: Sequence[tuple[str, Sequence[tuple[int, int]]]]) -> None:
    """A row for each phase, the first on top; a part that trains in part is filled so far."""
    for row, (_, counts) in enumerate(phases):
        shares = [trainable / max(1, frozen + trainable) for frozen, trainable in counts]
        for colour, widths in ((FROZEN, [1.0] * len(counts)), (TRAINABLE, shares)):
            boxes = [(place - 0.4, 0.8 * width) for place, width in enumerate(widths) if width]
            axes.broken_barh(boxes, (row - 0.35, 0.7), facecolors=colour)
    axes.set_yticks(range(len(phases)), [_cut(phase) for phase, _ in phases] if len(phases) > 1 else [""])
    axes.invert_yaxis()
    axes.grid(visible=False)


def _draw_line(axes: Axes, line: Line) -> None:
    colour = SERIES[line.colour % len(SERIES)]
    window = smoothing_window(len(line.values)) if line.rough else 1
    steps, low, mean, high = _thinned(line.steps, line.values)
    if window == 1:
        axes.plot(steps, mean, color=colour, linewidth=1.4, marker=line.marker, markersize=4, label=line.label)
        return
    if len(steps) < len(line.steps):
        axes.fill_between(steps, low, high, color=colour, alpha=0.22, linewidth=0)
    else:
        axes.plot(steps, mean, color=colour, linewidth=0.7, alpha=0.4)
    steps, _, mean, _ = _thinned(line.steps, running_mean(line.values, window))
    axes.plot(steps, mean, color=colour, linewidth=1.6, label=line.label)


def _thinned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Steps, and the least, mean and largest value of each bundle of neighbours, MAX_POINTS at most."""
    size = -(-len(values) // MAX_POINTS)
    if size <= 1:
        return steps, values, values, values
    starts = np.arange(0, len(values), size)
    counts = np.diff(np.append(starts, len(values)))
    mean = np.add.reduceat(values, starts) / counts
    return steps[starts], np.minimum.reduceat(values, starts), mean, np.maximum.reduceat(values, starts)


def _scale(axes: Axes, lines: Sequence[Line], may_be_log: bool, is_share: bool) -> None:
    values = np.concatenate([line.values[np.isfinite(line.values)] for line in lines]) if lines else np.zeros(0)
    if not len(values):
        return
    low, high = float(values.min()), float(values.max())
    if may_be_log and low > 0 and high / low > LOG_RATIO:
        axes.set_yscale("log")
    elif is_share and low >= 0 and high <= 1:
        pad = 0.08 * max(high - low, 0.05)
        axes.set_ylim(max(-0.02, low - pad), min(1.02, high + pad))
    elif low == high:
        pad = abs(low) * 0.1 or 1.0
        axes.set_ylim(low - pad, high + pad)


def _number(value: float) -> str:
    """A tick's label: 5e-5, 0.25, 1,200."""
    if value and not 1e-3 <= abs(value) < 1e6:
        exponent = math.floor(math.log10(abs(value)) + 1e-9)
        return f"{value / 10**exponent:.3g}e{exponent}"
    return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def _legend(figure: Figure, axes: Axes, marks: Marks) -> None:
    """Above the axes, where it covers no curve."""
    handles, labels = axes.get_legend_handles_labels()
    for steps, style, label in ((marks.phases, (0, (6, 3)), "phase starts"), (marks.resumes, ":", "run resumed")):
        if steps:
            handles.append(Line2D([], [], color=INK, linestyle=style, linewidth=1.2))
            labels.append(label)
    figure.legend(handles, labels, loc="outside upper left", ncols=3)


def _cut(text: str, length: int = 24) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


@contextmanager
def _drawing(name: str) -> Iterator[None]:
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        yield


def _to_svg(figure: Figure, name: str) -> str:
    """The figure as an <svg> element: ids of its own on the page, no prologue, no metadata, colours as variables."""
    out = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a browser has other fonts than matplotlib
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    text = re.sub(r"<(metadata|style).*?</\1>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(url\(|xlink:href=")#', rf"\1#{name}-", text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    return text.replace("<svg ", f'<svg role="img" aria-label="plot: {name}" ', 1)
