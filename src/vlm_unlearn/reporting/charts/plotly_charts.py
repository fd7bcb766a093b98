"""Converts charts to Plotly figures, as plain data that the page's script draws.

Colors that differ between light and dark mode are words ("ink", "soft", "line", "page"), which the script replaces.
Names are escaped, because Plotly would interpret them as markup.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import singledispatch
from typing import Any

from vlm_unlearn.reporting.charts.chart import (
    COLORS,
    Bars,
    Chart,
    Heatmap,
    Lines,
    PlacedLabel,
    Scatter,
    Series,
    Style,
    Value,
    display_name,
    distances,
    overlap_counts,
    place_labels,
)

Figure = dict[str, Any]
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star")
SHAPES = (  # the symbols as SVG paths in a box of 14 x 14, for the page's list of models
    "M7 1a6 6 0 1 1 0 12a6 6 0 1 1 0-12z",
    "M2 2h10v10H2z",
    "M7 .5L13.5 7L7 13.5L.5 7z",
    "M7 1.5L13.5 12.5H.5z",
    "M5 1h4v4h4v4H9v4H5V9H1V5h4z",
    "M1 4L4 1L7 4L10 1L13 4L10 7L13 10L10 13L7 10L4 13L1 10L4 7z",
    "M7 .5L9 5L13.8 5.4L10.2 8.6L11.3 13.4L7 10.8L2.7 13.4L3.8 8.6L.2 5.4L5 5z",
)
HATCHES = ("", "/", "\\", "x", ".", "-")
BAR, GAP = 15, 12  # thickness in pixels
TICKS = {"tickvals": [0, 25, 50, 75, 100], "ticktext": ["0", "25 %", "50 %", "75 %", "100 %"]}


@singledispatch
def plotly_figure(chart: Chart) -> Figure:
    """Returns a figure with ``data`` and ``layout``. ``layout.height`` is the height that the chart needs."""
    raise TypeError(type(chart).__name__)


def _text(name: str, max_length: int = 40) -> str:
    """Returns a name that Plotly shows as text: without markup, and without dollar signs, which enclose formulas."""
    return (
        display_name(name, max_length)
        .replace("&", "&amp;")
        .replace("<", "&lt;")
        .replace(">", "&gt;")
        .replace("$", "&#36;")
    )


def _hover(name: str, value: Value, low: Value, high: Value, unit: str = " %") -> str:
    if value is None:
        return ""
    number = f"{value:.1f}{unit}" if unit else f"{value:.4g}"
    return f"{_text(name)}: {number}" + ("" if low is None or high is None else f" [{low:.1f}, {high:.1f}]")


def _errors(values: Sequence[Value], low: Sequence[Value], high: Sequence[Value]) -> Figure:
    bar = {"color": "ink", "thickness": 1.2, "width": 3}
    return {
        "type": "data",
        "symmetric": False,
        "array": distances(high, values),
        "arrayminus": distances(low, values),
        **bar,
    }


def _marker(style: Style, hatched: bool) -> Figure:
    pattern = {
        "pattern": {"shape": HATCHES[style.hatch], "size": 6, "solidity": 0.25, "fgcolor": "ink", "fillmode": "overlay"}
    }
    return {
        "color": COLORS[style.color],
        "line": {"color": "ink", "width": 0.8},
        **(pattern if hatched and style.hatch else {}),
    }


def _layout(height: int, x: Figure, y: Figure, legend: bool) -> Figure:
    axis = {"gridcolor": "line", "linecolor": "soft", "zeroline": False, "automargin": True}
    return {
        "height": height,
        "font": {"color": "ink", "size": 12},
        "xaxis": axis | x,
        "yaxis": axis | y,
        "showlegend": legend,
        "legend": {
            "orientation": "h",
            "x": 0,
            "y": 1,
            "yanchor": "bottom",
            "bgcolor": "rgba(0,0,0,0)",
            "itemsizing": "constant",
        },
        "margin": {"l": 8, "r": 14, "t": 10, "b": 8},
        "hovermode": "closest",
        "hoverlabel": {"bgcolor": "page", "bordercolor": "line", "font": {"color": "ink"}},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "dragmode": False,
    }


def _percent(title: str) -> Figure:
    return {"title": {"text": _text(title, 60), "standoff": 6}, "range": [-3, 104], **TICKS}


@plotly_figure.register(Bars)
def _bars(chart: Bars) -> Figure:
    traces = []
    positions = list(range(len(chart.names)))
    for series in chart.series:
        hover = [f"{_text(name)}<br>{text}" for name, text in zip(chart.names, _hovers(series, " %"), strict=True)]
        trace: Figure = {"type": "bar", "orientation": "h", "name": _text(series.name)}
        trace |= {"y": positions, "x": list(series.values)}
        trace |= {"marker": _marker(series.style, hatched=True), "hoverinfo": "text", "hovertext": hover}
        traces.append(trace | ({"error_x": _errors(series.values, series.low, series.high)} if series.low else {}))
    thickness = BAR * (1 if chart.stacked else len(chart.series))
    height = (
        round(len(chart.names) * (thickness + GAP))
        + 64
        + (24 * (1 + len(chart.series) // 4) if chart.has_legend else 0)
    )
    ticks = {"tickvals": positions, "ticktext": [_text(name, 28) for name in chart.names]}
    y = {"autorange": False, "range": [len(positions) - 0.5, -0.5], **ticks}
    layout = _layout(height, _percent(chart.axis), y, chart.has_legend)
    gaps = {"barmode": "stack" if chart.stacked else "group", "bargap": GAP / (GAP + thickness)}
    return {"data": traces, "layout": layout | gaps | {"legend": layout["legend"] | {"traceorder": "normal"}}}


def _hovers(series: Series, unit: str) -> list[str]:
    missing = [None] * len(series.values)
    intervals = zip(series.values, series.low or missing, series.high or missing, strict=True)
    return [_hover(series.name, value, low, high, unit) for value, low, high in intervals]


@plotly_figure.register(Lines)
def _lines(chart: Lines) -> Figure:
    traces = []
    for series in chart.series:
        hover = _hovers(series, " %" if chart.percent else "")
        trace: Figure = {"type": "scatter", "name": _text(series.name), "x": list(series.x), "y": list(series.values)}
        trace |= {"mode": "lines+markers" if chart.markers else "lines", "hoverinfo": "text", "hovertext": hover}
        trace |= {
            "line": {
                "color": COLORS[series.style.color],
                "dash": ("solid", "dash", "dot", "dashdot")[series.style.shape % 4],
            }
        }
        trace |= {"marker": _marker(series.style, hatched=False) | {"symbol": SYMBOLS[series.style.shape], "size": 9}}
        traces.append(trace | ({"error_y": _errors(series.values, series.low, series.high)} if series.low else {}))
    x = {"title": {"text": _text(chart.x), "standoff": 6}} | ({"dtick": 1} if chart.markers else {})
    y = _percent(chart.y) if chart.percent else {"title": {"text": _text(chart.y)}}
    return {"data": traces, "layout": _layout(300 + 20 * (len(traces) // 3), x, y, len(traces) > 1)}


@plotly_figure.register(Heatmap)
def _heatmap(chart: Heatmap) -> Figure:
    cells = [["" if value is None else f"{value:.0f}" for value in row] for row in chart.values]
    hover = [
        [
            f"{_text(name)}<br>{_hover(column, value, None, None)}"
            for column, value in zip(chart.columns, row, strict=True)
        ]
        for name, row in zip(chart.rows, chart.values, strict=True)
    ]
    trace = {
        "type": "heatmap",
        "z": [list(row) for row in chart.values],
        "zmin": 0,
        "zmax": 100,
        "colorscale": SCALE,
        "xgap": 2,
        "ygap": 2,
    }
    trace |= {
        "text": cells,
        "texttemplate": "%{text}",
        "hoverinfo": "text",
        "hovertext": hover,
        "colorbar": {"ticksuffix": " %", "thickness": 10},
    }
    x = {
        "tickvals": list(range(len(chart.columns))),
        "ticktext": [_text(name, 24) for name in chart.columns],
        "showgrid": False,
    }
    y = {
        "tickvals": list(range(len(chart.rows))),
        "ticktext": [_text(name, 28) for name in chart.rows],
        "autorange": "reversed",
        "showgrid": False,
    }
    return {"data": [trace], "layout": _layout(90 + 24 * len(chart.rows), x, y, False)}


SCALE = [[0, "#fff7e6"], [0.5, "#56B4E9"], [1, "#003f63"]]  # light to dark, so that it is readable in gray as well


@plotly_figure.register(Scatter)
def _scatter(chart: Scatter) -> Figure:
    traces: list[Figure] = []
    for point, size in zip(chart.points, marker_sizes(chart), strict=True):
        hover = "<br>".join((_text(point.name), _hover(chart.x, *point.x), _hover(chart.y, *point.y)))
        marker = _marker(point.style, hatched=False) | {"symbol": SYMBOLS[point.style.shape], "size": size}
        error_bars = {
            f"error_{axis}": _errors(*([number] for number in numbers))
            for axis, numbers in (("x", point.x), ("y", point.y))
        }
        trace = {
            "type": "scatter",
            "mode": "markers",
            "name": _text(point.name, 24),
            "x": [point.x[0]],
            "y": [point.y[0]],
            "marker": marker,
            "cliponaxis": False,
        }
        traces.append(trace | error_bars | {"hoverinfo": "text", "hovertext": [hover]})
    layout = _layout(330, _percent(chart.x), _percent(chart.y), False)  # the page's list of models is its legend
    ideal_x, ideal_y = chart.ideal
    corner = {
        "type": "rect",
        "x0": ideal_x,
        "x1": abs(ideal_x - 10),
        "y0": ideal_y,
        "y1": abs(ideal_y - 10),
        "layer": "below",
    }
    corner |= {"line": {"width": 1, "color": "soft", "dash": "dot"}, "fillcolor": "rgba(0,158,115,.18)"}
    inside = {"x": abs(ideal_x - 11), "y": abs(ideal_y - 5), "xanchor": "left" if ideal_x == 0 else "right"}
    caption = inside | {
        "text": "ideal corner",
        "showarrow": False,
        "font": {"size": 11, "color": "soft"},
        "yanchor": "middle",
    }
    names = [
        {"x": label.x, "y": label.y, "text": _text(label.text, 80), "font": {"size": 12, "color": "ink"}}
        | _offset(label)
        for label in place_labels(chart)
    ]
    return {"data": traces, "layout": layout | {"shapes": [corner], "annotations": [caption, *names]}}


def _offset(label: PlacedLabel) -> Figure:
    """Returns the offset of a label. A label directly next to its point needs no line to the point."""
    if not label.dx or not label.dy:
        return {"showarrow": False, "xshift": label.dx, "yshift": label.dy}
    line = {"arrowhead": 0, "arrowwidth": 0.6, "arrowcolor": "soft", "standoff": 7, "borderpad": 0}
    return {"showarrow": True, "ax": label.dx, "ay": -label.dy, **line}


def marker_sizes(chart: Scatter) -> list[int]:
    """Returns the sizes of the points in pixels. Of overlapping points the later ones are smaller and stay visible."""
    return [max(5, 14 - 4 * overlaps) for overlaps in overlap_counts(chart)]
