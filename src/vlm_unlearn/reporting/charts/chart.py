"""What a chart shows, said once: the page draws it with Plotly, the files for papers are drawn with matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlm_unlearn.errors import printable
from vlm_unlearn.records import Rate

# Okabe and Ito's colours, which colour-blind readers can tell apart; each comes with a shape and a hatch of its own, so that no
# series is told by its colour alone.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
LONGEST_NAME = 40  # characters of a name in a chart
LONGEST_TITLE = 90
Value = float | None


@dataclass(frozen=True)
class Style:
    """A colour of `COLORS`, a shape and a hatch, by their numbers."""

    color: int
    shape: int = 0
    hatch: int = 0


# What means the same in every chart looks the same in every chart. Hatches: 0 none, then / \\ x . -
AS_ASKED, ATTACKED, CONTROL = Style(0), Style(1, 1, 1), Style(2, 2, 4)
LABEL_STYLES = {
    "complied": Style(0),
    "refused": Style(4, hatch=1),
    "degenerate": Style(3, hatch=3),
    "off_topic": Style(6, hatch=4),
    "failed": Style(6, hatch=5),
}


def style_of(number: int) -> Style:
    """The style of the n-th model: shapes turn slower than colours, so that 7 x 7 are told apart."""
    return Style(number % len(COLORS), (number + number // len(COLORS)) % len(COLORS), number % 6)


@dataclass(frozen=True)
class Series:
    """Values with their 95 % intervals, a value for each name or place of the chart's axis; None is not measured."""

    name: str
    values: Sequence[Value]
    low: Sequence[Value]  # empty: without intervals
    high: Sequence[Value]
    style: Style
    x: Sequence[float] = ()  # of a line


@dataclass(frozen=True)
class Titled:
    """A chart's title, which has somebody's names in it: it is held as `shown_name` shows it."""

    title: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "title", shown_name(self.title, LONGEST_TITLE))


@dataclass(frozen=True)
class Bars(Titled):
    """Horizontal bars from 0 to 100 %, a group or a stack for each name."""

    names: Sequence[str]
    series: Sequence[Series]
    stacked: bool = False
    axis: str = ""

    @property
    def keyed(self) -> bool:
        """Whether a legend says what the colours are: always in stacks, where the names beside the bars don't."""
        return self.stacked or len(self.series) > 1


@dataclass(frozen=True)
class Lines(Titled):
    """One line a series."""

    series: Sequence[Series]
    x: str
    y: str
    percent: bool  # whether y goes from 0 to 100 %
    markers: bool = True


@dataclass(frozen=True)
class Heatmap(Titled):
    """A value from 0 to 100 % for each row and column."""

    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[Value]]


@dataclass(frozen=True)
class Point:
    """A model's place in a plane, in percent, with its interval in both directions."""

    name: str
    x: tuple[float, float, float]  # value, low, high
    y: tuple[float, float, float]
    style: Style


@dataclass(frozen=True)
class Plane(Titled):
    """Two rates against each other, with the corner where a model should be."""

    points: Sequence[Point]
    x: str
    y: str
    ideal: tuple[float, float]


Chart = Bars | Lines | Heatmap | Plane


def rates_series(name: str, rates: Sequence[Rate | None], style: Style, x: Sequence[float] = ()) -> Series:
    """A series in percent out of rates."""
    found = [None if rate is None or rate.value is None else rate for rate in rates]
    values = [None if rate is None or rate.value is None else 100 * rate.value for rate in found]
    low = [None if rate is None or rate.low is None else 100 * rate.low for rate in found]
    high = [None if rate is None or rate.high is None else 100 * rate.high for rate in found]
    return Series(name, values, low, high, style, x)


def distances(ends: Sequence[Value], values: Sequence[Value]) -> list[float]:
    """How far an interval's ends lie from its values, as both drawing libraries want them; 0 where one of the two is missing."""
    return [0 if end is None or value is None else abs(end - value) for end, value in zip(ends, values, strict=True)]


def _drop(chart: Plane) -> list[int]:
    """For each point how many earlier ones lie at its place, within 1 %: drawn smaller on top of each other, all are seen."""
    at = [(point.x[0], point.y[0]) for point in chart.points]
    return [sum(abs(x - a) < 1 and abs(y - b) < 1 for a, b in at[:number]) for number, (x, y) in enumerate(at)]


def shown_name(name: str, longest: int = LONGEST_NAME) -> str:
    """A name of somebody's as a chart holds it: on one line, nothing in it that is no letter, its middle left out where it is long."""
    plain = printable(name if len(name) <= 2 * longest else name[:longest] + name[-longest:])  # a megabyte takes long
    half = (longest - 1) // 2
    return plain if len(plain) <= longest else f"{plain[:half]}…{plain[-half:]}"


@dataclass(frozen=True)
class PlacedLabel:
    """Names of models that lie so close together that they share a label; the offset is in pixels, y upwards."""

    text: str
    x: float
    y: float
    dx: float
    dy: float


LABELLED = 12  # beyond, names in a plane only cover each other, and the legend tells
NEAR = 4.0  # points of percent
NARROW = (250, 210)  # a plane's pixels on a phone, where labels have the least room
OFFSETS = (
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


def place_labels(chart: Plane) -> list[PlacedLabel]:
    """Names beside their points, each where it covers no other name, no other point and not the corner's own."""
    points = chart.points
    if len(points) > LABELLED:
        return []
    clusters: list[list[Point]] = []
    for point in points:
        close = (
            all(abs(a - b) <= NEAR for a, b in ((point.x[0], own[0].x[0]), (point.y[0], own[0].y[0])))
            for own in clusters
        )
        found = next((own for own, near in zip(clusters, close, strict=True) if near), None)
        if found is None:
            clusters.append([point])
        else:
            found.append(point)
    corner = _box(abs(chart.ideal[0] - 25), abs(chart.ideal[1] - 5), 0, 0, 74, 12)
    taken = [corner, *(_box(own[0].x[0], own[0].y[0], 0, 0, 16, 16) for own in clusters)]
    placed = []
    for own in clusters:
        names = [shown_name(point.name, 18) for point in own]
        text = ", ".join(names[:3]) + (f" +{len(names) - 3}" if len(names) > 3 else "")
        x, y = own[0].x[0], own[0].y[0]
        width = 6.2 * len(text) + 4
        choices = []
        for rank, (side, level) in enumerate(OFFSETS):
            dx, dy = side * (width / 2 + 10), level * 15.0
            if level == 0:  # beyond the end of the interval
                dx += side * abs(own[0].x[1 + (side > 0)] - x) / 100 * NARROW[0]
            box = _box(x, y, dx, dy, width, 14)
            left, right, bottom, top = box
            outside = (
                max(0, -left) + max(0, right - NARROW[0] - 14) + max(0, -bottom - 10) + max(0, top - NARROW[1] - 10)
            )
            covered = sum(
                max(0, min(box[1], t[1]) - max(left, t[0])) * max(0, min(top, t[3]) - max(bottom, t[2])) for t in taken
            )
            choices.append((covered + 20 * outside + rank, dx, dy, box))
        _, dx, dy, box = min(choices)
        taken.append(box)
        placed.append(PlacedLabel(text, x, y, dx, dy))
    return placed


def _box(x: float, y: float, dx: float, dy: float, width: float, height: float) -> tuple[float, float, float, float]:
    """Left, right, bottom, top in the pixels of a narrow plane."""
    at_x, at_y = x / 100 * NARROW[0] + dx, y / 100 * NARROW[1] + dy
    return at_x - width / 2, at_x + width / 2, at_y - height / 2, at_y + height / 2
