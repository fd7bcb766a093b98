"""The description of a table, which is written as CSV, LaTeX or Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vlm_unlearn.records import Rate, Row
from vlm_unlearn.reporting.columns import Better, better
from vlm_unlearn.reporting.formatting import interval, judges_of

CsvValue = str | int | float | None
MISSING = "–"


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Args:
        text: The text for readers.
        csv_values: The values for machines, by the name of their CSV column.
        interval: The interval in the unit of the text, such as ``"[8.1, 18.9]"``.
        mark: A mark next to the number, such as ``"*"``.
        failed: The number of answers or verdicts that failed and are not part of the number.
    """

    text: str
    csv_values: Mapping[str, CsvValue]
    interval: str = ""
    mark: str = ""
    failed: int = 0


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Args:
        key: The name of the column in the CSV.
        heading: The heading for readers.
        group: A common heading above adjacent columns of the same group.
        numeric: Whether the column contains numbers.
        better: Which numbers are better. The best number of the column is set in bold. None sets none in bold.
    """

    key: str
    heading: str
    group: str = ""
    numeric: bool = True
    better: Better | None = None


@dataclass(frozen=True)
class Table:
    """A table with a caption. A cell is None if nothing was measured.

    Args:
        name: The name of the files and of the LaTeX label.
        title: The first sentence of the caption.
        columns: The columns.
        lines: The lines of cells, each with one cell per column.
        variable: The name of the property that the numeric columns differ in, such as ``"metric"``. If it is set, the
            CSV is in long form: it has one line per number, with the key of the number's column in a CSV column of
            this name.
        notes: Further sentences of the caption.
    """

    name: str
    title: str
    columns: Sequence[Column]
    lines: Sequence[Sequence[Cell | None]]
    variable: str = ""
    notes: Sequence[str] = field(default_factory=tuple)

    def best_cells(self) -> set[tuple[int, int]]:
        """Returns line and column of the best numbers of each column, compared as precisely as they are printed.

        Columns with a single number and columns without a better direction have no best number.
        """
        best: set[tuple[int, int]] = set()
        for index, column in enumerate(self.columns):
            values = {
                number: float(cell.text)
                for number, line in enumerate(self.lines)
                if (cell := line[index]) is not None and column.better
            }
            if len(values) > 1:
                best_value = (min if column.better == "lower" else max)(values.values())
                best |= {(number, index) for number, value in values.items() if value == best_value}
        return best

    def caption(self, intervals: bool) -> str:
        """Returns title, notes and the meaning of brackets and bold print, in one paragraph."""
        cells = [cell for line in self.lines for cell in line if cell is not None]
        legend = ["In brackets: 95 % intervals."] if intervals and any(cell.interval for cell in cells) else []
        legend += ["Best in bold."] if self.best_cells() else []
        return " ".join([self.title, *self.notes, *legend])


def text_cell(key: str, text: str, csv_value: str | None = None) -> Cell:
    """Returns a cell of text. `csv_value` is its value in the CSV if that differs from the text."""
    return Cell(text, {key: text if csv_value is None else csv_value})


def rate_cell(rate: Rate | None, mark: str = "") -> Cell | None:
    """Returns a rate in percent, with the fields of summary.json in the CSV. Returns None if the rate has no value."""
    if rate is None or rate.value is None:
        return None
    return Cell(f"{100 * rate.value:.1f}", rate.model_dump(), interval(rate), mark, rate.failed)


def rate_column(rows: Sequence[Row], metric: str, heading: str, group: str = "") -> Column:
    """Returns the column of a metric. It has no best number if the rows have different judges."""
    return Column(metric, heading, group, better=better(metric) if len(judges_of(rows, [metric])) < 2 else None)


def text_columns(*keys: str) -> list[Column]:
    """Returns columns of text with their keys as headings."""
    return [Column(key, key, numeric=False) for key in keys]
