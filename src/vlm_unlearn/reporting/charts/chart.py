"""Descriptions of charts, independent of the library that draws them: Plotly in pages, matplotlib for papers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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


# The same series looks the same in every chart. Hatches: 0 is none, then / \\ x . -
ORIGINAL, ATTACKED, CONTROL = Style(0), Style(1, 1, 1), Style(2, 2, 4)
LABEL_STYLES = {
    "complied": Style(0),
    "refused": Style(4, hatch=1),
    "degenerate": Style(3, hatch=3),
    "off_topic": Style(6, hatch=4),
    "failed": Style(6, hatch=5),
}


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


@dataclass(frozen=True)
class Titled:
    """Base of all charts. The title may contain names from data files, so it is passed through `display_name`."""

    title: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "title", display_name(self.title, MAX_TITLE_LENGTH))


@dataclass(frozen=True)
class Bars(Titled):
    """Horizontal bars from 0 to 100 %, with one group or one stack per name."""

    names: Sequence[str]
    series: Sequence[Series]
    stacked: bool = False
    axis: str = ""

    @property
    def has_legend(self) -> bool:
        """Whether the chart needs a legend. A stack always does, because its axis does not name the series."""
        return self.stacked or len(self.series) > 1


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
    """A heatmap with a value from 0 to 100 % for each row and column."""

    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[Value]]


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


Chart = Bars | Lines | Heatmap | Scatter


def rates_series(name: str, rates: Sequence[Rate | None], style: Style, x: Sequence[float] = ()) -> Series:
    """Returns a series in percent. A rate without a value becomes None."""
    measured = [None if rate is None or rate.value is None else rate for rate in rates]
    values = [None if rate is None or rate.value is None else 100 * rate.value for rate in measured]
    low = [None if rate is None or rate.low is None else 100 * rate.low for rate in measured]
    high = [None if rate is None or rate.high is None else 100 * rate.high for rate in measured]
    return Series(name, values, low, high, style, x)


def distances(ends: Sequence[Value], values: Sequence[Value]) -> list[float]:
    """Returns the distance of each interval end from its value, or 0 if one of the two is None."""
    return [0 if end is None or value is None else abs(end - value) for end, value in zip(ends, values, strict=True)]


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


@dataclass(frozen=True)
class PlacedLabel:
    """A label of one point or several close points, with its offset from them in pixels (y upward)."""

    text: str
    x: float
    y: float
    dx: float
    dy: float


MAX_LABELED_POINTS = 12  # with more points the labels would overlap, so only the legend names them
LABEL_DISTANCE = 4.0  # percentage points within which points share a label
PHONE_SIZE = (250, 210)  # width and height of the chart on a phone in pixels, where labels have the least space
OFFSETS = (  # candidate positions of a label: side and line, in order of preference
    (1, 0),
    (-1, 0),
    (0, 1),
    (0, -1),
    (1, 1),
    (-1, 1),
    (1, -1),
    (-1, -1),
    (0, 2),
    (0, -2),
    (1, 2),
    (-1, 2),
    (1, -2),
    (-1, -2),
    (0, 3),
    (0, -3),
)


def place_labels(chart: Scatter) -> list[PlacedLabel]:
    """Returns the labels of the points, placed so that they cover no other label, no point and not the ideal corner.

    The list is empty if the chart has more than `MAX_LABELED_POINTS` points.
    """
    if len(chart.points) > MAX_LABELED_POINTS:
        return []
    clusters = _label_clusters(chart.points)
    corner = _box(abs(chart.ideal[0] - 25), abs(chart.ideal[1] - 5), 0, 0, 74, 12)
    occupied = [corner, *(_box(cluster[0].x[0], cluster[0].y[0], 0, 0, 16, 16) for cluster in clusters)]
    labels = []
    for cluster in clusters:
        names = [display_name(point.name, 18) for point in cluster]
        text = ", ".join(names[:3]) + (f" +{len(names) - 3}" if len(names) > 3 else "")
        x, y = cluster[0].x[0], cluster[0].y[0]
        width = 6.2 * len(text) + 4
        candidates = []
        for rank, (side, level) in enumerate(OFFSETS):
            dx, dy = side * (width / 2 + 10), level * 15.0
            if level == 0:  # beyond the end of the interval
                dx += side * abs(cluster[0].x[1 + (side > 0)] - x) / 100 * PHONE_SIZE[0]
            box = _box(x, y, dx, dy, width, 14)
            left, right, bottom, top = box
            outside = (
                max(0, -left)
                + max(0, right - PHONE_SIZE[0] - 14)
                + max(0, -bottom - 10)
                + max(0, top - PHONE_SIZE[1] - 10)
            )
            covered = sum(
                max(0, min(right, area[1]) - max(left, area[0])) * max(0, min(top, area[3]) - max(bottom, area[2]))
                for area in occupied
            )
            candidates.append((covered + 20 * outside + rank, dx, dy, box))
        _, dx, dy, box = min(candidates)
        occupied.append(box)
        labels.append(PlacedLabel(text, x, y, dx, dy))
    return labels


def _label_clusters(points: Sequence[Point]) -> list[list[Point]]:
    """Groups points that are so close together that they share a label."""
    clusters: list[list[Point]] = []
    for point in points:
        for cluster in clusters:
            if all(
                abs(a - b) <= LABEL_DISTANCE for a, b in ((point.x[0], cluster[0].x[0]), (point.y[0], cluster[0].y[0]))
            ):
                cluster.append(point)
                break
        else:
            clusters.append([point])
    return clusters


def _box(x: float, y: float, dx: float, dy: float, width: float, height: float) -> tuple[float, float, float, float]:
    """Returns left, right, bottom and top of a box in the pixels of `PHONE_SIZE`.

    Args:
        x: Position of the anchor in percent.
        y: Position of the anchor in percent.
        dx: Offset of the center from the anchor in pixels.
        dy: Offset of the center from the anchor in pixels.
        width: Width in pixels.
        height: Height in pixels.
    """
    center_x, center_y = x / 100 * PHONE_SIZE[0] + dx, y / 100 * PHONE_SIZE[1] + dy
    return center_x - width / 2, center_x + width / 2, center_y - height / 2, center_y + height / 2
