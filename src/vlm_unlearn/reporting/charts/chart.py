"""Descriptions of charts: their data, styles and names. `matplotlib_charts` draws them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from vlm_unlearn.errors import printable
from vlm_unlearn.records import Rate

# Okabe and Ito's palette, which color-blind readers can distinguish. Every style also has a shape and a hatch, so that
# no series is identified by its color alone.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
MAX_NAME_LENGTH = 40  # characters
MAX_TITLE_LENGTH = 90
Value = float | None


@dataclass(frozen=True)
class Style:
    """A style of a series: indices of a color in `COLORS`, a shape and a hatch."""

    color: int
    shape: int = 0
    hatch: int = 0


def style_of(number: int) -> Style:
    """Returns the style of the n-th model. The first 49 models have distinct pairs of color and shape."""
    return Style(number % len(COLORS), (number + number // len(COLORS)) % len(COLORS), number % 6)


@dataclass(frozen=True)
class Series:
    """A series of values with 95 % intervals, one for each name or position on the axis. None means not measured."""

    name: str
    values: Sequence[Value]
    low: Sequence[Value]  # empty if the series has no intervals
    high: Sequence[Value]
    style: Style
    x: Sequence[float] = ()  # positions of the points of a line
    is_reference: bool = False  # whether the line is drawn in the color of the text, to compare the others with

    @property
    def error_bars(self) -> list[list[float]] | None:
        """The distances of the interval ends from their values, 0 for a value without an interval."""
        return [
            [
                0 if end is None or value is None else abs(end - value)
                for end, value in zip(ends, self.values, strict=True)
            ]
            for ends in (self.low, self.high)
            if ends
        ] or None


@dataclass(frozen=True)
class Titled:
    """Base of all charts. The title may contain names from data files, so it is passed through `display_name`.

    The description is for readers who do not see the chart. Without it, they are referred to the tables.
    """

    title: str
    description: str = field(default="", kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "title", display_name(self.title, MAX_TITLE_LENGTH))


@dataclass(frozen=True)
class Bars(Titled):
    """Horizontal bars from 0 to 100 %, with one group or one stack per name."""

    names: Sequence[str]
    series: Sequence[Series]
    stacked: bool = False
    axis: str = ""


@dataclass(frozen=True)
class Lines(Titled):
    """A line chart with one line per series."""

    series: Sequence[Series]
    x: str
    y: str
    percent: bool  # whether the y axis is from 0 to 100 %
    markers: bool = True


@dataclass(frozen=True)
class Heatmap(Titled):
    """A heatmap with a value for each row and column. Values outside of 0 to 100 % get the color of the nearest end.

    A cell with the value None is empty, or hatched if `texts` has a text for it. The text is in place of the rounded
    value. Its second line, after a line break, is in small print.
    """

    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[Value]]
    texts: Sequence[Sequence[str]] = ()
    hovers: Sequence[Sequence[str]] = ()  # shown under the mouse


@dataclass(frozen=True)
class Point:
    """A model in a scatter chart, in percent, with an interval in both directions."""

    name: str
    x: tuple[float, float, float]  # value, low, high
    y: tuple[float, float, float]
    style: Style


@dataclass(frozen=True)
class Scatter(Titled):
    """Two rates plotted against each other, with the ideal corner marked."""

    points: Sequence[Point]
    x: str
    y: str
    ideal: tuple[float, float]


@dataclass(frozen=True)
class FrontPoint:
    """A trial of a sweep in a plane of two objectives.

    Attributes:
        name: The trial.
        x: The first objective.
        y: The second objective.
        kind: ``front``, ``dominated``, ``outside`` (of the constraints) or ``base``.
        seeds: The single models whose mean the point is, if there are several.
    """

    name: str
    x: float
    y: float
    kind: str
    seeds: Sequence[tuple[float, float]] = ()


@dataclass(frozen=True)
class Front(Titled):
    """The trials of a sweep in a plane of two objectives, in percent, with the Pareto front as a line."""

    points: Sequence[FrontPoint]
    x: str
    y: str


@dataclass(frozen=True)
class ParallelAxis:
    """An axis of parallel coordinates: the positions of the lines from 0 to 1, and texts at some positions."""

    name: str
    positions: Sequence[Value]  # one for each line, None if the line has no such value
    ticks: Sequence[tuple[float, str]]


@dataclass(frozen=True)
class Parallel(Titled):
    """Parallel coordinates: one line for each trial, through its settings and its objectives."""

    names: Sequence[str]  # of the lines
    axes: Sequence[ParallelAxis]
    highlighted: Sequence[bool]  # whether a line is on the front


Chart = Bars | Lines | Heatmap | Scatter | Front | Parallel


def percentages(rate: Rate | None) -> tuple[Value, Value, Value]:
    """Returns value, low and high of a rate in percent. All are None if the rate has no value."""
    ends = (None, None, None) if rate is None or rate.value is None else (rate.value, rate.low, rate.high)
    value, low, high = (None if end is None else 100 * end for end in ends)
    return value, low, high


def rates_series(name: str, rates: Sequence[Rate | None], style: Style, x: Sequence[float] = ()) -> Series:
    """Returns a series in percent. A rate without a value becomes None."""
    values, low, high = ([ends[index] for ends in map(percentages, rates)] for index in range(3))
    return Series(name, values, low, high, style, x)


def hover_texts(chart: Chart) -> list[str]:
    """Returns the name and numbers of each bar or point, which the page shows under the mouse.

    The bars of the first series come first. Lines have none, and heatmaps only those that their description contains.
    """
    if isinstance(chart, Heatmap):
        return [printable(text) for row in chart.hovers for text in row]
    if isinstance(chart, Bars):
        return [
            f"{display_name(name)}, {display_name(series.name)}: {_number(*numbers)}"
            for series in chart.series
            for name, *numbers in itertools.zip_longest(chart.names, series.values, series.low, series.high)
        ]
    if isinstance(chart, Scatter):
        x, y = display_name(chart.x), display_name(chart.y)
        return [
            f"{display_name(point.name)}, {x}: {_number(*point.x)}, {y}: {_number(*point.y)}" for point in chart.points
        ]
    if isinstance(chart, Front):
        x, y = display_name(chart.x), display_name(chart.y)
        return [f"{display_name(point.name, 160)}: {x} {point.x:.1f}, {y} {point.y:.1f}" for point in chart.points]
    if isinstance(chart, Parallel):
        return [display_name(name, 160) for name in chart.names]
    return []


def _number(value: Value, low: Value, high: Value) -> str:
    interval = "" if low is None or high is None else f" [{low:.1f}, {high:.1f}]"
    return "not measured" if value is None else f"{value:.1f} %{interval}"


def overlap_counts(chart: Scatter) -> list[int]:
    """Returns for each point the number of earlier points within 1 %. Later points are drawn smaller, so all show."""
    positions = [(point.x[0], point.y[0]) for point in chart.points]
    return [
        sum(abs(x - other_x) < 1 and abs(y - other_y) < 1 for other_x, other_y in positions[:number])
        for number, (x, y) in enumerate(positions)
    ]


def display_name(name: str, max_length: int = MAX_NAME_LENGTH) -> str:
    """Returns a name from a data file on one line, with control characters escaped and a long middle omitted."""
    # Truncated first, because escaping a megabyte takes long.
    text = printable(name if len(name) <= 2 * max_length else name[:max_length] + name[-max_length:])
    half = (max_length - 1) // 2
    return text if len(text) <= max_length else f"{text[:half]}…{text[-half:]}"
