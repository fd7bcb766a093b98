"""Draws a chart's description as a Plotly figure: plain data, which the page's script draws.

Colours that depend on light and dark are words ("ink", "soft", "line", "page"), which the script puts in. Names are shown as text: Plotly
would take them for markup.
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
    Plane,
    Series,
    Style,
    Value,
    _drop,
    distances,
    place_labels,
    shown_name,
)

Figure = dict[str, Any]
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star")
SHAPES = (  # the symbols as SVG paths in a square of 14, for the page's list of models
    "M7 1a6 6 0 1 1 0 12a6 6 0 1 1 0-12z",
    "M2 2h10v10H2z",
    "M7 .5L13.5 7L7 13.5L.5 7z",
    "M7 1.5L13.5 12.5H.5z",
    "M5 1h4v4h4v4H9v4H5V9H1V5h4z",
    "M1 4L4 1L7 4L10 1L13 4L10 7L13 10L10 13L7 10L4 13L1 10L4 7z",
    "M7 .5L9 5L13.8 5.4L10.2 8.6L11.3 13.4L7 10.8L2.7 13.4L3.8 8.6L.2 5.4L5 5z",
)
HATCHES = ("", "/", "\\", "x", ".", "-")
BAR, GAP = 15, 12  # pixels
TICKS = {"tickvals": [0, 25, 50, 75, 100], "ticktext": ["0", "25 %", "50 %", "75 %", "100 %"]}


@singledispatch
def plotly_figure(chart: Chart) -> Figure:
    """The figure's ``data`` and ``layout``; ``layout.height`` is what it needs."""
    raise TypeError(type(chart).__name__)


def _text(name: str, longest: int = 40) -> str:
    """As Plotly reads it: no markup, and no formula, which two dollar signs would make."""
    return (
        shown_name(name, longest).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("$", "&#36;")
    )


def _hover(name: str, value: Value, low: Value, high: Value, unit: str = " %") -> str:
    if value is None:
        return ""
    figures = f"{value:.1f}{unit}" if unit else f"{value:.4g}"
    return f"{_text(name)}: {figures}" + ("" if low is None or high is None else f" [{low:.1f}, {high:.1f}]")


def _errors(values: Sequence[Value], low: Sequence[Value], high: Sequence[Value]) -> Figure:
    shape = {"color": "ink", "thickness": 1.2, "width": 3}
    return {
        "type": "data",
        "symmetric": False,
        "array": distances(high, values),
        "arrayminus": distances(low, values),
        **shape,
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
    places = list(range(len(chart.names)))
    for one in chart.series:
        hover = [f"{_text(name)}<br>{told}" for name, told in zip(chart.names, _hovers(one, " %"), strict=True)]
        trace: Figure = {"type": "bar", "orientation": "h", "name": _text(one.name), "y": places, "x": list(one.values)}
        trace |= {"marker": _marker(one.style, hatched=True), "hoverinfo": "text", "hovertext": hover}
        traces.append(trace | ({"error_x": _errors(one.values, one.low, one.high)} if one.low else {}))
    thick = BAR * (1 if chart.stacked else len(chart.series))
    height = round(len(chart.names) * (thick + GAP)) + 64 + (24 * (1 + len(chart.series) // 4) if chart.keyed else 0)
    ticks = {"tickvals": places, "ticktext": [_text(name, 28) for name in chart.names]}
    y = {"autorange": False, "range": [len(places) - 0.5, -0.5], **ticks}
    layout = _layout(height, _percent(chart.axis), y, chart.keyed)
    gaps = {"barmode": "stack" if chart.stacked else "group", "bargap": GAP / (GAP + thick)}
    return {"data": traces, "layout": layout | gaps | {"legend": layout["legend"] | {"traceorder": "normal"}}}


def _hovers(one: Series, unit: str) -> list[str]:
    nothing = [None] * len(one.values)
    ends = zip(one.values, one.low or nothing, one.high or nothing, strict=True)
    return [_hover(one.name, value, low, high, unit) for value, low, high in ends]


@plotly_figure.register(Lines)
def _lines(chart: Lines) -> Figure:
    traces = []
    for one in chart.series:
        hover = _hovers(one, " %" if chart.percent else "")
        trace: Figure = {"type": "scatter", "name": _text(one.name), "x": list(one.x), "y": list(one.values)}
        trace |= {"mode": "lines+markers" if chart.markers else "lines", "hoverinfo": "text", "hovertext": hover}
        trace |= {
            "line": {"color": COLORS[one.style.color], "dash": ("solid", "dash", "dot", "dashdot")[one.style.shape % 4]}
        }
        trace |= {"marker": _marker(one.style, hatched=False) | {"symbol": SYMBOLS[one.style.shape], "size": 9}}
        traces.append(trace | ({"error_y": _errors(one.values, one.low, one.high)} if one.low else {}))
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


SCALE = [[0, "#fff7e6"], [0.5, "#56B4E9"], [1, "#003f63"]]  # light to dark, so that it reads in grey as well


@plotly_figure.register(Plane)
def _plane(chart: Plane) -> Figure:
    traces: list[Figure] = []
    for one, size in zip(chart.points, marker_sizes(chart), strict=True):
        hover = "<br>".join((_text(one.name), _hover(chart.x, *one.x), _hover(chart.y, *one.y)))
        marker = _marker(one.style, hatched=False) | {"symbol": SYMBOLS[one.style.shape], "size": size}
        ends = {f"error_{way}": _errors(*([end] for end in values)) for way, values in (("x", one.x), ("y", one.y))}
        trace = {
            "type": "scatter",
            "mode": "markers",
            "name": _text(one.name, 24),
            "x": [one.x[0]],
            "y": [one.y[0]],
            "marker": marker,
            "cliponaxis": False,
        }
        traces.append(trace | ends | {"hoverinfo": "text", "hovertext": [hover]})
    layout = _layout(330, _percent(chart.x), _percent(chart.y), False)  # the page's list of models is its legend
    at_x, at_y = chart.ideal
    corner = {"type": "rect", "x0": at_x, "x1": abs(at_x - 10), "y0": at_y, "y1": abs(at_y - 10), "layer": "below"}
    corner |= {"line": {"width": 1, "color": "soft", "dash": "dot"}, "fillcolor": "rgba(0,158,115,.18)"}
    inside = {"x": abs(at_x - 11), "y": abs(at_y - 5), "xanchor": "left" if at_x == 0 else "right"}
    said = inside | {
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
    return {"data": traces, "layout": layout | {"shapes": [corner], "annotations": [said, *names]}}


def _offset(label: PlacedLabel) -> Figure:
    """A label aside of its point needs no line to it."""
    if not label.dx or not label.dy:
        return {"showarrow": False, "xshift": label.dx, "yshift": label.dy}
    line = {"arrowhead": 0, "arrowwidth": 0.6, "arrowcolor": "soft", "standoff": 7, "borderpad": 0}
    return {"showarrow": True, "ax": label.dx, "ay": -label.dy, **line}


def marker_sizes(chart: Plane) -> list[int]:
    """Pixels: of points at one place, the later ones are smaller, so that all are seen."""
    return [max(5, 14 - 4 * before) for before in _drop(chart)]
