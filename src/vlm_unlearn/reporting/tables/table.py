"""A table that is described once and written as CSV, LaTeX or Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vlm_unlearn.records import Rate, Row
from vlm_unlearn.reporting.columns import Better, better
from vlm_unlearn.reporting.formatting import interval, judges_of

Raw = str | int | float | None
NOTHING = "–"


@dataclass(frozen=True)
class Cell:
    """What people read in one place of a table, and what machines read there."""

    text: str
    raw: Mapping[str, Raw]  # by the name that the CSV's column has
    interval: str = ""  # "[8.1, 18.9]", in the unit of the text
    mark: str = ""  # "*" beside the number
    failed: int = 0  # answers or verdicts that the number leaves out


@dataclass(frozen=True)
class Column:
    """One column; those of the same `group` stand under one heading."""

    key: str  # what the CSV calls it
    heading: str
    group: str = ""
    numbers: bool = True
    better: Better | None = None  # the best number of the column is set in bold


@dataclass(frozen=True)
class Table:
    """Lines of cells below columns. A cell is None where nothing was measured.

    `across` says what the columns of numbers tell apart, such as "metric". The CSV of such a table has one line a number, with that name
    in a column of its own: a form that needs no reshaping before it is drawn or fitted.
    """

    name: str  # of its files and its label
    title: str
    columns: Sequence[Column]
    lines: Sequence[Sequence[Cell | None]]
    across: str = ""
    notes: Sequence[str] = field(default_factory=tuple)  # sentences of the caption

    def best(self) -> set[tuple[int, int]]:
        """Line and column of each column's best numbers, as precise as they are printed; none in a column with a single number."""
        found: set[tuple[int, int]] = set()
        for number, column in enumerate(self.columns):
            printed = {
                at: float(cell.text)
                for at, line in enumerate(self.lines)
                if (cell := line[number]) is not None and column.better
            }
            if len(printed) > 1:
                best = (min if column.better == "lower" else max)(printed.values())
                found |= {(at, number) for at, value in printed.items() if value == best}
        return found

    def caption(self, intervals: bool) -> str:
        """Title and notes in one paragraph, and what the marks of the table mean."""
        shown = [cell for line in self.lines for cell in line if cell is not None]
        marks = ["In brackets: 95 % intervals."] if intervals and any(cell.interval for cell in shown) else []
        marks += ["Best in bold."] if self.best() else []
        return " ".join([self.title, *self.notes, *marks])


def text_cell(key: str, text: str, raw: str | None = None) -> Cell:
    """A cell of words; `raw` where machines read another name than people."""
    return Cell(text, {key: text if raw is None else raw})


def rate_cell(rate: Rate | None, mark: str = "") -> Cell | None:
    """A rate in percent; to machines as in summary.json. None where nothing could be scored."""
    if rate is None or rate.value is None:
        return None
    return Cell(f"{100 * rate.value:.1f}", rate.model_dump(), interval(rate), mark, rate.failed)


def rate_column(rows: Sequence[Row], metric: str, heading: str, group: str = "") -> Column:
    """A metric's column. Where its rows have two judges none of its numbers is the best: they can't be told apart from their judges."""
    return Column(metric, heading, group, better=better(metric) if len(judges_of(rows, [metric])) < 2 else None)


def text_columns(*keys: str) -> list[Column]:
    """Columns of words, headed by their keys."""
    return [Column(key, key, numbers=False) for key in keys]


def counts(title: str, by_metric: Mapping[str, Sequence[int]]) -> str:
    """``"n = 36 (ASR), 36 to 40 (SARR)"``: how many stand behind each metric's numbers, the same counts told once.

    Args:
        by_metric: of each metric's heading the counts of all models.
    """
    told: dict[str, list[str]] = {}
    for name, numbers in by_metric.items():
        low, high = min(numbers), max(numbers)
        told.setdefault(f"{low:,}" if low == high else f"{low:,} to {high:,}", []).append(name)
    return f"{title}{', '.join(count + ' (' + ', '.join(names) + ')' for count, names in told.items())}"
