"""Plotly figures as plain data; the report's page draws them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlm_unlearn.records import LABELS, Rate, Row

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = {
    "before": "#0072B2",
    "after": "#D55E00",
    "control": "#009E73",
    "complied": "#0072B2",
    "refused": "#E69F00",
    "degenerate": "#CC79A7",
    "off_topic": "#999999",
}
Figure = dict[str, Any]


def rate_bars(rows: Sequence[Row], metrics: Sequence[tuple[str, str, str]], title: str) -> Figure:
    """Grouped bars with 95 % intervals, one group a model.

    Args:
        metrics: ``(metric, name in the legend, colour key)``.
    """
    traces = []
    for metric, name, colour in metrics:
        measured = [(row.model, row.metrics[metric]) for row in rows if metric in row.metrics and row.metrics[metric].value is not None]
        rates = [rate for _, rate in measured]
        x = [model for model, _ in measured]
        if measured:
            traces.append({"type": "bar", "name": name, "x": x, "marker": {"color": COLOURS[colour]}, **_with_intervals(rates)})
    return {"data": traces, "layout": layout(title) | {"barmode": "group"}}


def shot_curves(rows: Sequence[Row], metric: str, title: str) -> Figure:
    """A metric's rate with the first 1, 2, ... K shots, with 95 % intervals, one line a model."""
    traces = []
    for number, row in enumerate(rows):
        measured = [(shots, rate) for shots, rate in enumerate(row.shots.get(metric, []), start=1) if rate.value is not None]
        if measured:
            trace = {"type": "scatter", "mode": "lines+markers", "name": row.model, "x": [shots for shots, _ in measured]}
            marker = {"symbol": number, "size": 8}  # a shape each: colours alone don't tell lines apart for everybody
            traces.append({**trace, "marker": marker, **_with_intervals([rate for _, rate in measured])})
    xaxis = {"title": {"text": "shots (rewrites of each question)"}, "dtick": 1, "automargin": True}
    return {"data": traces, "layout": layout(title) | {"xaxis": xaxis, "showlegend": True}}


def _with_intervals(rates: Sequence[Rate]) -> dict[str, Any]:
    """A trace's values in percent and its error bars."""
    values = [100 * (rate.value or 0) for rate in rates]
    above = [100 * (rate.high or 0) - value for rate, value in zip(rates, values, strict=True)]
    below = [value - 100 * (rate.low or 0) for rate, value in zip(rates, values, strict=True)]
    return {"y": values, "error_y": {"type": "data", "symmetric": False, "array": above, "arrayminus": below}}


def label_bars(rows: Sequence[Row], case: str, title: str) -> Figure:
    """Stacked bars: where the answers of one case went, in percent."""
    shown = [row for row in rows if sum(row.labels.get(case, {}).values())]
    traces = []
    for label in LABELS:
        shares = [100 * row.labels[case][label] / sum(row.labels[case].values()) for row in shown]
        name = label.replace("_", " ")
        traces.append({"type": "bar", "name": name, "x": [row.model for row in shown], "y": shares, "marker": {"color": COLOURS[label]}})
    return {"data": traces, "layout": layout(title) | {"barmode": "stack"}}


def layout(title: str) -> dict[str, Any]:
    """What all figures share."""
    return {
        "title": {"text": title},
        "yaxis": {"range": [0, 103], "ticksuffix": " %"},
        "xaxis": {"automargin": True},
        "legend": {"orientation": "h", "y": 1, "yanchor": "bottom", "x": 0},
        "margin": {"l": 55, "r": 10, "t": 95, "b": 40},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
    }
