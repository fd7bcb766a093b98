"""Draws charts with matplotlib, as PNG, SVG and PDF for papers."""

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
    Scatter,
    Series,
    Value,
    display_name,
    distances,
    overlap_counts,
    place_labels,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

FORMATS = ("png", "svg", "pdf")
# File names of plots, and of temporary files that a killed process left.
PLOT_FILE = re.compile(
    r"\.?(tradeoff-\w+|attack-\w+|rates-\w+|benchmarks|(categories|shots|labels|loss)-\d+)(\.part)?\.(png|svg|pdf)"
)
SYMBOLS = ("o", "s", "D", "^", "P", "X", "*")
HATCHES = ("", "///", "\\\\\\", "xxx", "...", "---")
LETTER_WIDTH = 0.078  # inches per letter at 9 points, a generous estimate
# Names such as "$x$" are not formulas. Text stays text in SVG and PDF, so that readers can search it.
SETTINGS: Mapping[Any, Any] = {
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "vlm-unlearn",
    "pdf.fonttype": 42,  # TrueType: journals reject Type 3 fonts
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "hatch.linewidth": 0.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def write_plots(folder: Path, charts: Mapping[str, Chart], on_done: OnDone | None = None) -> list[Path]:
    """Draws each chart into ``NAME.png``, ``NAME.svg`` and ``NAME.pdf``.

    Args:
        folder: The folder for the files. It is created if it does not exist.
        charts: The charts by name.
        on_done: Called after each chart with "plots", the number of finished charts and the number of all charts.

    Returns:
        The files.
    """
    import matplotlib

    folder.mkdir(parents=True, exist_ok=True)
    with (
        matplotlib.rc_context(dict(SETTINGS)),
        warnings.catch_warnings(action="ignore", category=UserWarning),  # the font lacks the letters of a name
    ):
        for done, (name, chart) in enumerate(charts.items(), start=1):
            canvas = draw_chart(chart)
            for kind in FORMATS:
                temporary_file = folder / f".{name}.part.{kind}"
                undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
                canvas.savefig(temporary_file, dpi=150, metadata=undated.get(kind))
                temporary_file.replace(folder / f"{name}.{kind}")
            if on_done:
                on_done("plots", done, len(charts))
    return [folder / f"{name}.{kind}" for name in charts for kind in FORMATS]


def delete_stale_plots(folder: Path, current: Collection[Path]) -> None:
    """Deletes plots of an earlier report and temporary files of a killed process. Files with other names are kept."""
    for file in folder.iterdir():
        if PLOT_FILE.fullmatch(file.name) and file not in current:
            file.unlink()


@singledispatch
def draw_chart(chart: Chart) -> Canvas:
    """Returns the drawing of a chart. Call it with `SETTINGS` in effect."""
    raise TypeError(type(chart).__name__)


def _canvas(
    width: float, height: float, left: float, bottom: float, legend_rows: int, title: str
) -> tuple[Canvas, Any]:
    """Returns a canvas and its axes.

    The margins are computed here, which takes a tenth of the time of matplotlib's automatic layout. All sizes are in
    inches.
    """
    from matplotlib.figure import Figure as Canvas  # without pyplot, which keeps figures open and may need a display

    top = 0.38 + 0.2 * legend_rows
    total_height = height + bottom + top
    canvas = Canvas(figsize=(width, total_height))
    axes = canvas.add_axes((left / width, bottom / total_height, 1 - (left + 0.2) / width, height / total_height))
    canvas.suptitle(title, x=0.1 / width, y=1 - 0.08 / total_height, ha="left", va="top", fontsize=10)
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
    return max(1, min(len(names), int((width - 0.2) / (longest * LETTER_WIDTH * 0.9 + 0.5))))


def _numbers(values: Sequence[Value]) -> list[float]:
    return [float("nan") if value is None else value for value in values]


def _error_bars(series: Series) -> list[list[float]] | None:
    return [distances(series.low, series.values), distances(series.high, series.values)] if series.low else None


def _percent_axis(axis: Any) -> None:
    axis.set_ticks([0, 25, 50, 75, 100], [f"{tick} %" for tick in (0, 25, 50, 75, 100)])


@draw_chart.register(Bars)
def _bars(chart: Bars) -> Canvas:
    names = [display_name(name, 28) for name in chart.names]
    legend = [display_name(series.name) for series in chart.series]
    columns = _legend_columns(legend, 6.4)
    thickness = 0.17 * (1 if chart.stacked else len(chart.series))
    left = 0.3 + LETTER_WIDTH * max(map(len, names), default=1)
    rows = -(-len(legend) // columns) if chart.has_legend else 0
    canvas, axes = _canvas(6.4, max(0.5, len(names) * (thickness + 0.13)), left, 0.5, rows, chart.title)
    positions = list(range(len(names)))
    starts = [0.0] * len(names)
    height = thickness / (thickness + 0.13) / (1 if chart.stacked else len(chart.series))
    for number, series in enumerate(chart.series):
        offset = 0 if chart.stacked else (number - (len(chart.series) - 1) / 2) * height
        axes.barh(
            [position + offset for position in positions],
            _numbers(series.values),
            height=height,
            left=starts if chart.stacked else None,
            label=legend[number],
            color=COLORS[series.style.color],
            hatch=HATCHES[series.style.hatch],
            edgecolor="black",
            lw=0.5,
            xerr=_error_bars(series),
            error_kw={"lw": 0.9, "capsize": 1.5},
        )
        starts = [start + (value or 0.0) for start, value in zip(starts, series.values, strict=True)]
    axes.set_yticks(positions, names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(0, 102)
    _percent_axis(axes.xaxis)
    axes.set_xlabel(display_name(chart.axis))
    axes.grid(axis="x", alpha=0.3)
    if rows:
        _legend(canvas, axes, columns)
    return canvas


@draw_chart.register(Lines)
def _lines(chart: Lines) -> Canvas:
    legend = [display_name(series.name) for series in chart.series]
    columns = _legend_columns(legend, 6.4)
    rows = -(-len(legend) // columns) if len(legend) > 1 else 0
    canvas, axes = _canvas(6.4, 2.7, 0.75, 0.5, rows, chart.title)
    for series, name in zip(chart.series, legend, strict=True):
        dash = ("-", "--", ":", "-.")[series.style.shape % 4]
        appearance = {"color": COLORS[series.style.color], "ls": dash, "lw": 1.6, "label": name}
        appearance |= {"marker": SYMBOLS[series.style.shape], "ms": 5} if chart.markers else {}
        axes.errorbar(
            list(series.x), _numbers(series.values), yerr=_error_bars(series), capsize=2, elinewidth=0.9, **appearance
        )
    axes.set(xlabel=display_name(chart.x), ylabel=display_name(chart.y))
    if chart.percent:
        axes.set_ylim(-2, 103)
        _percent_axis(axes.yaxis)
    if chart.markers:
        axes.set_xticks(sorted({x for series in chart.series for x in series.x}))
    axes.grid(alpha=0.3)
    if rows:
        _legend(canvas, axes, columns)
    return canvas


@draw_chart.register(Heatmap)
def _heatmap(chart: Heatmap) -> Canvas:
    from matplotlib.colors import LinearSegmentedColormap

    names, columns = [display_name(name, 28) for name in chart.rows], [display_name(name, 24) for name in chart.columns]
    left = 0.3 + LETTER_WIDTH * max(map(len, names), default=1)
    slanted = LETTER_WIDTH * max(map(len, columns), default=1) > 4 / len(columns)
    canvas, axes = _canvas(
        6.4,
        0.25 * len(names),
        left,
        0.3 + (0.7 * LETTER_WIDTH * max(map(len, columns)) if slanted else 0),
        0,
        chart.title,
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


def _draw_ideal_corner(axes: Any, ideal: tuple[float, float]) -> None:
    ideal_x, ideal_y = ideal
    axes.axvspan(
        ideal_x,
        abs(ideal_x - 10),
        0 if ideal_y == 0 else 0.88,
        0.12 if ideal_y == 0 else 1,
        color="#009E73",
        alpha=0.15,
        lw=0,
    )
    axes.text(
        abs(ideal_x - 11),
        abs(ideal_y - 5),
        "ideal corner",
        fontsize=7.5,
        color="#555555",
        ha="left" if ideal_x == 0 else "right",
        va="center",
    )


@draw_chart.register(Scatter)
def _scatter(chart: Scatter) -> Canvas:
    legend = [display_name(point.name, 24) for point in chart.points]
    columns = _legend_columns(legend, 5.2)
    rows = -(-len(legend) // columns) if len(legend) > 1 else 0
    canvas, axes = _canvas(5.2, 3.3, 0.8, 0.5, rows, chart.title)
    _draw_ideal_corner(axes, chart.ideal)
    for point, name, overlaps in zip(chart.points, legend, overlap_counts(chart), strict=True):
        error_bars = {key: [[v[0] - v[1]], [v[2] - v[0]]] for key, v in (("xerr", point.x), ("yerr", point.y))}
        appearance = {
            "color": COLORS[point.style.color],
            "mec": "black",
            "mew": 0.5,
            "ecolor": "black",
            "elinewidth": 0.8,
            "capsize": 2,
        }
        axes.errorbar(
            [point.x[0]],
            [point.y[0]],
            **error_bars,
            fmt=SYMBOLS[point.style.shape],
            ms=max(3, 9 - 2 * overlaps),
            label=name,
            zorder=3 + overlaps,
            **appearance,
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
    axes.set(xlabel=display_name(chart.x), ylabel=display_name(chart.y), xlim=(-2, 103), ylim=(-2, 103))
    _percent_axis(axes.xaxis)
    _percent_axis(axes.yaxis)
    axes.grid(alpha=0.3)
    if rows:
        _legend(canvas, axes, columns)
    return canvas
