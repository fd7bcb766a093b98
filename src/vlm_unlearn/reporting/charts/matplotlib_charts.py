"""Draws a chart's description with matplotlib, as PNG, SVG and PDF for papers."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from functools import singledispatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_unlearn.evaluation.generate import OnDone
from vlm_unlearn.reporting.charts.chart import (
    COLORS,
    Bars,
    Chart,
    Heatmap,
    Lines,
    Plane,
    Series,
    Value,
    _drop,
    distances,
    place_labels,
    shown_name,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

FORMATS = ("png", "svg", "pdf")
# Names of plots, and of such a file in the making.
OURS = re.compile(
    r"\.?(tradeoff-\w+|attack-\w+|rates-\w+|benchmarks|(categories|shots|labels|loss)-\d+)(\.part)?\.(png|svg|pdf)"
)
SYMBOLS = ("o", "s", "D", "^", "P", "X", "*")
HATCHES = ("", "///", "\\\\\\", "xxx", "...", "---")
LETTER = 0.078  # inches of a letter at 9 points, generously
# Names are no formulas ("$x$"); text stays text in SVG and PDF, so that a paper's reader can search it.
SETTINGS: Mapping[Any, Any] = {
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "vlm-unlearn",
    "pdf.fonttype": 42,  # journals refuse type 3
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "hatch.linewidth": 0.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def write_plots(folder: Path, charts: Mapping[str, Chart], on_done: OnDone | None = None) -> list[Path]:
    """Draws each chart into ``NAME.png``, ``NAME.svg`` and ``NAME.pdf``.

    Args:
        on_done: told how far it is: "plots", done, all.
    """
    import matplotlib

    folder.mkdir(parents=True, exist_ok=True)
    with (
        matplotlib.rc_context(dict(SETTINGS)),
        warnings.catch_warnings(action="ignore", category=UserWarning),
    ):  # a script without letters
        for done, (name, chart) in enumerate(charts.items(), start=1):
            canvas = canvas_of(chart)
            for kind in FORMATS:
                part = folder / f".{name}.part.{kind}"
                undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
                canvas.savefig(part, dpi=150, metadata=undated.get(kind))
                part.replace(folder / f"{name}.{kind}")
            if on_done:
                on_done("plots", done, len(charts))
    return [folder / f"{name}.{kind}" for name in charts for kind in FORMATS]


def delete_stale_plots(folder: Path, kept: Collection[Path]) -> None:
    """Deletes the plots of an earlier report that this one doesn't have, and what a kill left; files of other names are a reader's own."""
    for file in folder.iterdir():
        if OURS.fullmatch(file.name) and file not in kept:
            file.unlink()


@singledispatch
def canvas_of(chart: Chart) -> Canvas:
    """The drawing of a chart; call it under `SETTINGS`."""
    raise TypeError(type(chart).__name__)


def _canvas(
    width: float, height: float, left: float, bottom: float, legend_rows: int, title: str
) -> tuple[Canvas, Any]:
    """A canvas and its axes, the margins in inches: reckoned here, which takes a tenth of the time of having them found."""
    from matplotlib.figure import Figure as Canvas  # no pyplot: nothing is left open, and no display is needed

    top = 0.38 + 0.2 * legend_rows
    canvas = Canvas(figsize=(width, height + bottom + top))
    whole = height + bottom + top
    axes = canvas.add_axes((left / width, bottom / whole, 1 - (left + 0.2) / width, height / whole))
    canvas.suptitle(title, x=0.1 / width, y=1 - 0.08 / whole, ha="left", va="top", fontsize=10)
    axes.set_axisbelow(True)
    return canvas, axes


def _legend(canvas: Canvas, axes: Any, columns: int) -> None:
    height = canvas.get_figheight()
    canvas.legend(
        *axes.get_legend_handles_labels(),
        loc="upper left",
        bbox_to_anchor=(0.0, 1 - 0.26 / height),
        ncols=columns,
        frameon=False,
        fontsize=8,
        columnspacing=1.2,
        handlelength=1.6,
        borderaxespad=0.1,
    )


def _legend_columns(names: Sequence[str], width: float) -> int:
    longest = max((len(name) for name in names), default=1)
    return max(1, min(len(names), int((width - 0.2) / (longest * LETTER * 0.9 + 0.5))))


def _numbers(values: Sequence[Value]) -> list[float]:
    return [float("nan") if value is None else value for value in values]


def _ends(one: Series) -> list[list[float]] | None:
    if not one.low:
        return None

    return [distances(one.low, one.values), distances(one.high, one.values)]


def _percent_axis(axis: Any) -> None:
    axis.set_ticks([0, 25, 50, 75, 100], [f"{tick} %" for tick in (0, 25, 50, 75, 100)])


@canvas_of.register(Bars)
def _bars(chart: Bars) -> Canvas:
    names = [shown_name(name, 28) for name in chart.names]
    legend = [shown_name(one.name) for one in chart.series]
    columns = _legend_columns(legend, 6.4)
    thick = 0.17 * (1 if chart.stacked else len(chart.series))
    left = 0.3 + LETTER * max(map(len, names), default=1)
    rows = -(-len(legend) // columns) if chart.keyed else 0
    canvas, axes = _canvas(6.4, max(0.5, len(names) * (thick + 0.13)), left, 0.5, rows, chart.title)
    places = list(range(len(names)))
    below = [0.0] * len(names)
    height = thick / (thick + 0.13) / (1 if chart.stacked else len(chart.series))
    for number, one in enumerate(chart.series):
        at = places if chart.stacked else [place + (number - (len(chart.series) - 1) / 2) * height for place in places]
        axes.barh(
            at,
            _numbers(one.values),
            height=height,
            left=below if chart.stacked else None,
            label=legend[number],
            color=COLORS[one.style.color],
            hatch=HATCHES[one.style.hatch],
            edgecolor="black",
            lw=0.5,
            xerr=_ends(one),
            error_kw={"lw": 0.9, "capsize": 1.5},
        )
        below = [sum(pair) for pair in zip(below, [value or 0.0 for value in one.values], strict=True)]
    axes.set_yticks(places, names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(0, 102)
    _percent_axis(axes.xaxis)
    axes.set_xlabel(shown_name(chart.axis))
    axes.grid(axis="x", alpha=0.3)
    if rows:
        _legend(canvas, axes, columns)
    return canvas


@canvas_of.register(Lines)
def _lines(chart: Lines) -> Canvas:
    legend = [shown_name(one.name) for one in chart.series]
    columns = _legend_columns(legend, 6.4)
    rows = -(-len(legend) // columns) if len(legend) > 1 else 0
    canvas, axes = _canvas(6.4, 2.7, 0.75, 0.5, rows, chart.title)
    for one, name in zip(chart.series, legend, strict=True):
        dash = ("-", "--", ":", "-.")[one.style.shape % 4]
        look = {"color": COLORS[one.style.color], "ls": dash, "lw": 1.6, "label": name}
        look |= {"marker": SYMBOLS[one.style.shape], "ms": 5} if chart.markers else {}
        axes.errorbar(list(one.x), _numbers(one.values), yerr=_ends(one), capsize=2, elinewidth=0.9, **look)
    axes.set(xlabel=shown_name(chart.x), ylabel=shown_name(chart.y))
    if chart.percent:
        axes.set_ylim(-2, 103)
        _percent_axis(axes.yaxis)
    if chart.markers:
        axes.set_xticks(sorted({x for one in chart.series for x in one.x}))
    axes.grid(alpha=0.3)
    if rows:
        _legend(canvas, axes, columns)
    return canvas


@canvas_of.register(Heatmap)
def _heatmap(chart: Heatmap) -> Canvas:
    from matplotlib.colors import LinearSegmentedColormap

    names, columns = [shown_name(name, 28) for name in chart.rows], [shown_name(name, 24) for name in chart.columns]
    left = 0.3 + LETTER * max(map(len, names), default=1)
    slanted = LETTER * max(map(len, columns), default=1) > 4 / len(columns)
    canvas, axes = _canvas(
        6.4, 0.25 * len(names), left, 0.3 + (0.7 * LETTER * max(map(len, columns)) if slanted else 0), 0, chart.title
    )
    scale = LinearSegmentedColormap.from_list("rates", ["#fff7e6", "#56B4E9", "#003f63"])
    axes.imshow([_numbers(row) for row in chart.values], cmap=scale, vmin=0, vmax=100, aspect="auto")
    for y, row in enumerate(chart.values):
        for x, value in enumerate(row):
            if value is not None:
                axes.text(
                    x, y, f"{value:.0f}", ha="center", va="center", fontsize=7, color="white" if value > 70 else "black"
                )
    axes.set_xticks(range(len(columns)), columns, rotation=45 if slanted else 0, ha="right" if slanted else "center")
    axes.set_yticks(range(len(names)), names)
    return canvas


@canvas_of.register(Plane)
def _plane(chart: Plane) -> Canvas:
    legend = [shown_name(one.name, 24) for one in chart.points]
    columns = _legend_columns(legend, 5.2)
    rows = -(-len(legend) // columns) if len(legend) > 1 else 0
    canvas, axes = _canvas(5.2, 3.3, 0.8, 0.5, rows, chart.title)
    at_x, at_y = chart.ideal
    axes.axvspan(
        at_x, abs(at_x - 10), 0 if at_y == 0 else 0.88, 0.12 if at_y == 0 else 1, color="#009E73", alpha=0.15, lw=0
    )
    axes.text(
        abs(at_x - 11),
        abs(at_y - 5),
        "ideal corner",
        fontsize=7.5,
        color="#555555",
        ha="left" if at_x == 0 else "right",
        va="center",
    )
    for one, name, before in zip(chart.points, legend, _drop(chart), strict=True):
        ends = {way: [[v[0] - v[1]], [v[2] - v[0]]] for way, v in (("xerr", one.x), ("yerr", one.y))}
        look = {
            "color": COLORS[one.style.color],
            "mec": "black",
            "mew": 0.5,
            "ecolor": "black",
            "elinewidth": 0.8,
            "capsize": 2,
        }
        axes.errorbar(
            [one.x[0]],
            [one.y[0]],
            **ends,
            fmt=SYMBOLS[one.style.shape],
            ms=max(3, 9 - 2 * before),
            label=name,
            zorder=3 + before,
            **look,
        )
    for label in place_labels(chart):
        axes.annotate(
            label.text,
            (label.x, label.y),
            xytext=(label.dx * 0.8, label.dy * 0.85),
            textcoords="offset points",
            fontsize=8,
            ha="center",
            va="center",
            arrowprops={"arrowstyle": "-", "lw": 0.4, "color": "#555555", "shrinkB": 4}
            if label.dx and label.dy
            else None,
        )
    axes.set(xlabel=shown_name(chart.x), ylabel=shown_name(chart.y), xlim=(-2, 103), ylim=(-2, 103))
    _percent_axis(axes.xaxis)
    _percent_axis(axes.yaxis)
    axes.grid(alpha=0.3)
    if rows:
        _legend(canvas, axes, columns)
    return canvas
