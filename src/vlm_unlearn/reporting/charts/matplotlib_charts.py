"""Draws charts with matplotlib, as PNG, SVG and PDF. The page embeds the SVG."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import singledispatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_unlearn.evaluation.generate import OnDone
from vlm_unlearn.reporting.charts.chart import (
    COLORS,
    Bars,
    Chart,
    Front,
    Heatmap,
    Lines,
    Parallel,
    Scatter,
    Value,
    display_name,
    overlap_counts,
)
from vlm_unlearn.worker_pool import Progress, Task, run_tasks

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

FORMATS = ("png", "svg", "pdf")
# File names of plots, and of temporary files that a killed process left.
PLOT_FILE = re.compile(
    r"\.?(tradeoff-\w+|attack-\w+|rates-\w+|benchmarks|attack-map|pareto-\d+|parallel|importance|hypervolume|(categories|shots|labels|loss|curve)-\d+)(\.part)?\.(png|svg|pdf)"
)
SYMBOLS = ("o", "s", "D", "^", "P", "X", "*")
HATCHES = ("", "///", "\\\\\\", "xxx", "|||", "---")
MIN_CELL_WIDTH = 0.55  # inches of a heatmap's cell with an interval
LETTER_WIDTH = 0.078  # inches per letter at 9 points, a generous estimate
TITLE_HEIGHT = 0.24  # inches at the top of a drawing
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
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "grid.alpha": 0.3,
}


def write_plots(
    plot_dir: Path, charts: Mapping[str, Chart], on_done: OnDone | None = None, processes: int = 1
) -> list[Path]:
    """Draws each chart into ``NAME.png``, ``NAME.svg`` and ``NAME.pdf``.

    Args:
        plot_dir: The folder for the files. It is created if it does not exist.
        charts: The charts by name.
        on_done: Called after each chart with "plots", the number of finished charts and the number of all charts.
        processes: The number of charts that are drawn at the same time, each by its own process.

    Returns:
        The files.

    Raises:
        RunError: A process was killed.
    """
    plot_dir.mkdir(parents=True, exist_ok=True)
    run_tasks(
        [Task(name, _write_plot, (plot_dir, name, chart)) for name, chart in charts.items()],
        processes,
        lambda *_: None,
        on_finished=None if on_done is None else lambda done, total: on_done("plots", done, total),
    )
    return [plot_dir / f"{name}.{kind}" for name in charts for kind in FORMATS]


def _write_plot(plot_dir: Path, name: str, chart: Chart, _progress: Progress) -> None:
    import matplotlib

    with (
        matplotlib.rc_context(dict(SETTINGS)),
        warnings.catch_warnings(action="ignore", category=UserWarning),  # the font lacks the letters of a name
    ):
        canvas = draw_chart(chart)
        for kind in FORMATS:
            temporary_file = plot_dir / f".{name}.part.{kind}"
            undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
            canvas.savefig(temporary_file, dpi=150, metadata=undated.get(kind))
            temporary_file.replace(plot_dir / f"{name}.{kind}")


def delete_stale_plots(plot_dir: Path, current: Collection[Path]) -> None:
    """Deletes plots of an earlier report and temporary files of a killed process. Files with other names are kept."""
    for file in plot_dir.iterdir():
        if PLOT_FILE.fullmatch(file.name) and file not in current:
            file.unlink()


def draw_chart(chart: Chart) -> Canvas:
    """Returns the drawing of a chart. Call it with `SETTINGS` in effect.

    The n-th bar or point has the SVG id ``mark-N``, in the order of `hover_texts`. The title has the id ``title``.
    """
    canvas, axes = _draw(chart)
    if _legend(chart):
        handles, names = axes.get_legend_handles_labels()
        canvas.legend(
            handles,
            names,
            loc="upper left",
            bbox_to_anchor=(0.0, 1 - (TITLE_HEIGHT + 0.02) / canvas.get_figheight()),
            ncols=_legend_columns(names, canvas.get_figwidth()),
            frameon=False,
            fontsize=8,
            columnspacing=1.2,
            handlelength=1.6,
            borderaxespad=0.1,
        )
    return canvas


def _canvas(chart: Chart, size: tuple[float, float], left: float, bottom: float = 0.5) -> tuple[Canvas, Any]:
    """Returns a canvas with a title and with space for the legend above its axes, and the axes.

    The margins are computed here, which takes a tenth of the time of matplotlib's automatic layout.

    Args:
        chart: The chart.
        size: Width of the canvas and height of the axes in inches.
        left: Margin left of the axes in inches.
        bottom: Margin below the axes in inches.
    """
    from matplotlib.figure import Figure as Canvas  # without pyplot, which keeps figures open and may need a display

    width, height = size
    names = _legend(chart)
    legend_rows = -(-len(names) // _legend_columns(names, width))
    total_height = height + bottom + TITLE_HEIGHT + 0.14 + 0.2 * legend_rows
    canvas = Canvas(figsize=(width, total_height))
    axes = canvas.add_axes((left / width, bottom / total_height, 1 - (left + 0.2) / width, height / total_height))
    top = 1 - 0.08 / total_height
    canvas.suptitle(chart.title, x=0.1 / width, y=top, ha="left", va="top", fontsize=10, gid="title")
    return canvas, axes


def _legend(chart: Chart) -> list[str]:
    """Returns the names in the legend. A stack always has one, because its axis does not name the series."""
    if isinstance(chart, Heatmap | Front | Parallel):
        return []
    if isinstance(chart, Scatter):
        names = [display_name(point.name, 24) for point in chart.points]
    else:
        names = [display_name(series.name) for series in chart.series]
    return names if len(names) > 1 or (isinstance(chart, Bars) and chart.stacked) else []


def _legend_columns(names: Sequence[str], width: float) -> int:
    longest = max((len(name) for name in names), default=1)
    return max(1, min(len(names), int((width - 0.2) / (longest * LETTER_WIDTH * 0.9 + 0.5))))


def _name_width(names: Iterable[str]) -> float:
    return LETTER_WIDTH * max(map(len, names), default=1)


def _numbers(values: Sequence[Value]) -> list[float]:
    return [float("nan") if value is None else value for value in values]


def _percent_axis(axis: Any) -> None:
    axis.set_ticks([0, 25, 50, 75, 100], [f"{tick} %" for tick in (0, 25, 50, 75, 100)])


@singledispatch
def _draw(chart: Chart) -> tuple[Canvas, Any]:
    """Returns the drawing of a chart without its legend, and its axes."""
    raise TypeError(type(chart).__name__)


@_draw.register(Bars)
def _bars(chart: Bars) -> tuple[Canvas, Any]:
    names = [display_name(name, 28) for name in chart.names]
    bars_per_name = 1 if chart.stacked else len(chart.series)
    thickness = 0.17 * bars_per_name  # of all bars of a name, in inches
    size = (4.6, max(0.5, len(names) * (thickness + 0.13)))
    canvas, axes = _canvas(chart, size, 0.3 + _name_width(names))
    positions = list(range(len(names)))
    starts = [0.0] * len(names)
    height = thickness / (thickness + 0.13) / bars_per_name
    for number, series in enumerate(chart.series):
        offset = 0 if chart.stacked else (number - (bars_per_name - 1) / 2) * height
        bars = axes.barh(
            [position + offset for position in positions],
            _numbers(series.values),
            height=height,
            left=starts if chart.stacked else None,
            label=display_name(series.name),
            color=COLORS[series.style.color],
            hatch=HATCHES[series.style.hatch],
            edgecolor="black",
            lw=0.5,
            xerr=series.error_bars,
            error_kw={"lw": 0.9, "capsize": 1.5},
        )
        for position, bar in enumerate(bars):
            bar.set_gid(f"mark-{number * len(names) + position}")
        starts = [start + (value or 0.0) for start, value in zip(starts, series.values, strict=True)]
    axes.set_yticks(positions, names)
    axes.set(xlim=(0, 102), ylim=(len(names) - 0.5, -0.5), xlabel=display_name(chart.axis))
    _percent_axis(axes.xaxis)
    axes.grid(axis="x")
    return canvas, axes


@_draw.register(Lines)
def _lines(chart: Lines) -> tuple[Canvas, Any]:
    canvas, axes = _canvas(chart, (4.6, 2.2), 0.75)
    for series in chart.series:
        dash = ("-", "--", ":", "-.")[series.style.shape % 4]
        color = "black" if series.is_reference else COLORS[series.style.color]
        appearance = {"color": color, "ls": dash, "lw": 1.6, "label": display_name(series.name)}
        appearance |= {"marker": SYMBOLS[series.style.shape], "ms": 5} if chart.markers else {}
        axes.errorbar(
            list(series.x), _numbers(series.values), yerr=series.error_bars, capsize=2, elinewidth=0.9, **appearance
        )
    axes.set(xlabel=display_name(chart.x), ylabel=display_name(chart.y))
    if chart.percent:
        axes.set_ylim(-2, 103)
        _percent_axis(axes.yaxis)
    if chart.markers:
        axes.set_xticks(sorted({x for series in chart.series for x in series.x}))
    axes.grid()
    return canvas, axes


@_draw.register(Heatmap)
def _heatmap(chart: Heatmap) -> tuple[Canvas, Any]:
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Rectangle

    names, columns = [display_name(name, 28) for name in chart.rows], [display_name(name, 24) for name in chart.columns]
    has_two_lines = any("\n" in text for row in chart.texts for text in row)
    left = 0.3 + _name_width(names)
    width = max(6.4, left + 0.2 + MIN_CELL_WIDTH * len(columns)) if chart.texts else 6.4
    slanted = max(map(len, columns), default=0) * LETTER_WIDTH > (width - left - 0.2) / max(len(columns), 1)
    bottom = 0.3 + (0.7 * _name_width(columns) if slanted else 0)
    canvas, axes = _canvas(chart, (width, (0.34 if has_two_lines else 0.25) * len(names)), left, bottom)
    scale = LinearSegmentedColormap.from_list("rates", ["#fff7e6", "#56B4E9", "#003f63"])
    values = [[min(max(value, 0.0), 100.0) for value in _numbers(row)] for row in chart.values]
    axes.imshow(values, cmap=scale, vmin=0, vmax=100, aspect="auto")
    for y, row in enumerate(chart.values):
        for x, value in enumerate(row):
            text = chart.texts[y][x] if chart.texts else "" if value is None else f"{value:.0f}"
            corner = (x - 0.5, y - 0.5)
            if value is None and text:
                axes.add_patch(Rectangle(corner, 1, 1, fc="#e6e6e6", ec="#a8a8a8", hatch="////", lw=0))
            if chart.hovers:  # an invisible rectangle above the text
                axes.add_patch(Rectangle(corner, 1, 1, alpha=0, zorder=4, gid=f"mark-{y * len(columns) + x}"))
            color = "white" if value is not None and value > 70 else "#111111"  # black would change in dark mode
            upper, _, lower = text.partition("\n")
            offset = 0.17 if lower else 0
            style = {"ha": "center", "va": "center", "color": color, "zorder": 3}
            axes.text(x, y - offset, upper, fontsize=7, **style)
            axes.text(x, y + 0.24, lower, fontsize=5.5, **style)
    axes.set_xticks(range(len(columns)), columns, rotation=45 if slanted else 0, ha="right" if slanted else "center")
    axes.set_yticks(range(len(names)), names)
    return canvas, axes


@_draw.register(Scatter)
def _scatter(chart: Scatter) -> tuple[Canvas, Any]:
    canvas, axes = _canvas(chart, (4.0, 2.7), 0.75)
    ideal_x, ideal_y = chart.ideal
    corner = (0, 0.12) if ideal_y == 0 else (0.88, 1)
    axes.axvspan(ideal_x, abs(ideal_x - 10), *corner, color="#009E73", alpha=0.15, lw=0)
    side = "left" if ideal_x == 0 else "right"
    position = abs(ideal_x - 11), abs(ideal_y - 5)
    axes.text(*position, "ideal corner", fontsize=7.5, color="#555555", ha=side, va="center")
    for number, (point, overlaps) in enumerate(zip(chart.points, overlap_counts(chart), strict=True)):
        error_bars = {key: [[v[0] - v[1]], [v[2] - v[0]]] for key, v in (("xerr", point.x), ("yerr", point.y))}
        drawing = axes.errorbar(
            [point.x[0]],
            [point.y[0]],
            **error_bars,
            fmt=SYMBOLS[point.style.shape],
            ms=max(3, 9 - 2 * overlaps),
            label=display_name(point.name, 24),
            zorder=3 + overlaps,
            color=COLORS[point.style.color],
            mec="black",
            mew=0.5,
            ecolor="black",
            elinewidth=0.8,
            capsize=2,
        )
        drawing.lines[0].set_gid(f"mark-{number}")
    axes.set(xlabel=display_name(chart.x), ylabel=display_name(chart.y), xlim=(-2, 103), ylim=(-2, 103))
    _percent_axis(axes.xaxis)
    _percent_axis(axes.yaxis)
    axes.grid()
    return canvas, axes


# Color, shape and size of the points of a front, by kind.
FRONT_STYLES = {
    "front": ("#D55E00", "o", 7),
    "dominated": ("#999999", "o", 5),
    "outside": ("#CC79A7", "X", 6),
    "base": ("#0072B2", "*", 11),
}


@_draw.register(Front)
def _front(chart: Front) -> tuple[Canvas, Any]:
    canvas, axes = _canvas(chart, (4.6, 3.2), 0.75)
    on_front = sorted((point.x, point.y) for point in chart.points if point.kind == "front")
    axes.plot([x for x, _ in on_front], [y for _, y in on_front], color="#D55E00", lw=1, zorder=2)
    for number, point in enumerate(chart.points):
        color, shape, size = FRONT_STYLES[point.kind]
        for x, y in point.seeds:
            axes.plot([point.x, x], [point.y, y], color=color, lw=0.6, alpha=0.6, zorder=1)
            axes.plot([x], [y], ".", color=color, ms=3, zorder=1)
        order = 4 if point.kind in ("front", "base") else 3
        style = {"color": color, "mec": "black", "mew": 0.4, "ms": size, "zorder": order}
        (line,) = axes.plot([point.x], [point.y], shape, **style)
        line.set_gid(f"mark-{number}")
    axes.set(xlabel=display_name(chart.x), ylabel=display_name(chart.y))
    for limits, set_limits in ((axes.get_xlim(), axes.set_xlim), (axes.get_ylim(), axes.set_ylim)):
        set_limits(max(limits[0], -3.0), min(limits[1], 103.0) if limits[0] < 100 else limits[1])
    axes.grid()
    return canvas, axes


@_draw.register(Parallel)
def _parallel(chart: Parallel) -> tuple[Canvas, Any]:
    canvas, axes = _canvas(chart, (max(6.4, 1.15 * len(chart.axes) + 1.2), 2.8), 0.9, 0.9)
    order = sorted(range(len(chart.names)), key=lambda number: chart.highlighted[number])
    for number in order:
        points = [(x, axis.positions[number]) for x, axis in enumerate(chart.axes)]
        measured = [(x, y) for x, y in points if y is not None]
        color, width, alpha = ("#D55E00", 1.6, 1.0) if chart.highlighted[number] else ("#999999", 0.8, 0.5)
        x_values, y_values = [x for x, _ in measured], [y for _, y in measured]
        (line,) = axes.plot(x_values, y_values, color=color, lw=width, alpha=alpha, marker=".", ms=4)
        line.set_gid(f"mark-{number}")
    for x, axis in enumerate(chart.axes):
        axes.axvline(x, color="#555555", lw=0.8)
        for y, text in axis.ticks:
            axes.text(x + 0.03, y, display_name(text, 18), fontsize=7, va="center", zorder=5)
    names = [display_name(axis.name, 26) for axis in chart.axes]
    axes.set_xticks(range(len(names)), names, rotation=20, ha="right", fontsize=8)
    axes.set(ylim=(-0.06, 1.06), xlim=(-0.2, len(names) - 0.3), yticks=[])
    for side in axes.spines.values():
        side.set_visible(False)
    return canvas, axes
