"""The description of a table, which is written as CSV, LaTeX or Markdown, and the notes of its caption."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from vlm_unlearn.records import Rate, Row
from vlm_unlearn.reporting.columns import Better, better
from vlm_unlearn.reporting.formatting import interval, judged_by, judges_of

CsvValue = str | int | float | None
MISSING = "–"


@dataclass(frozen=True)
class Cell:
    """One cell of a table: a text for readers, and values for machines."""

    text: str
    csv_values: Mapping[str, CsvValue]  # by the name of their CSV column
    interval: str = ""  # in the unit of the text, such as "[8.1, 18.9]"
    mark: str = ""  # next to the number, such as "*"
    failed: int = 0  # the answers or verdicts that failed and are not part of the number


@dataclass(frozen=True)
class Column:
    """One column of a table."""

    key: str  # the name of the column in the CSV
    heading: str
    group: str = ""  # a common heading above adjacent columns of the same group
    numeric: bool = True
    better: Better | None = None  # the best number of the column is set in bold; None sets none in bold


@dataclass(frozen=True)
class Table:
    """A table with a caption. A cell is None if nothing was measured.

    If `variable` is set, such as to ``"metric"``, the numeric columns differ in this property. The CSV is then in long
    form: it has one line per number, with the key of the number's column in a CSV column of this name.
    """

    name: str  # the name of the files and of the LaTeX label
    title: str  # the first sentence of the caption
    columns: Sequence[Column]
    lines: Sequence[Sequence[Cell | None]]  # one cell per column
    variable: str = ""
    notes: Sequence[str] = ()  # further sentences of the caption

    def best_cells(self) -> set[tuple[int, int]]:
        """Returns line and column of the best numbers of each column, compared as precisely as they are printed.

        Columns with a single number and columns without a better direction have no best number.
        """
        best: set[tuple[int, int]] = set()
        for index, column in enumerate(self.columns):
            cells = [(number, line[index]) for number, line in enumerate(self.lines) if column.better]
            values = {number: float(cell.text) for number, cell in cells if cell is not None}
            if len(values) > 1:
                best_value = (min if column.better == "lower" else max)(values.values())
                best |= {(number, index) for number, value in values.items() if value == best_value}
        return best

    def caption(self, intervals: bool) -> str:
        """Returns title, notes and the meaning of brackets and bold print, in one paragraph."""
        bracketed = intervals and any(cell and cell.interval for line in self.lines for cell in line)
        legend = ["In brackets: 95 % intervals."] if bracketed else []
        legend += ["Best in bold."] if self.best_cells() else []
        return " ".join([self.title, *self.notes, *legend])


def rate_cell(rate: Rate | None, mark: str = "") -> Cell | None:
    """Returns a rate in percent, with the fields of summary.json in the CSV. Returns None if the rate has no value."""
    if rate is None or rate.value is None:
        return None
    return Cell(f"{100 * rate.value:.1f}", rate.model_dump(), interval(rate), mark, rate.failed)


# A cell, a rate, a text, a text with another text for the CSV, or None if nothing was measured.
Value = Cell | Rate | str | tuple[str, str] | None


def table_lines(columns: Sequence[Column], lines: Iterable[Sequence[Value]]) -> list[list[Cell | None]]:
    """Returns the lines of a table from values for each column."""
    return [[_cell(column, value) for column, value in zip(columns, line, strict=True)] for line in lines]


def _cell(column: Column, value: Value) -> Cell | None:
    if isinstance(value, str):
        return Cell(value, {column.key: value})
    if isinstance(value, tuple):
        return Cell(value[0], {column.key: value[1]})
    return rate_cell(value) if isinstance(value, Rate) else value


def rate_column(rows: Sequence[Row], metric: str, heading: str, group: str = "") -> Column:
    """Returns the column of a metric. It has no best number if the rows have different judges."""
    return Column(metric, heading, group, better=better(metric) if len(judges_of(rows, [metric])) < 2 else None)


def text_columns(*keys: str) -> list[Column]:
    """Returns columns of text with their keys as headings."""
    return [Column(key, key, numeric=False) for key in keys]


RatesByTitle = Mapping[str, Sequence[Rate]]  # title of a metric -> its rates


def rates_by_title(rows: Iterable[Row], titles: Mapping[str, str]) -> RatesByTitle:
    """Returns the rates of all rows by the title of the metric. `titles` has the title of each metric."""
    return {title: [row.metrics[metric] for row in rows if metric in row.metrics] for metric, title in titles.items()}


def rate_notes(
    rows: Sequence[Row],
    titles: Mapping[str, str],
    rates: RatesByTitle | None = None,
    failures: RatesByTitle | None = None,
) -> list[str]:
    """Returns the notes on the metrics of a table: judges, sample sizes and failures.

    Args:
        rows: The rows of the table.
        titles: The title of each metric.
        rates: The rates of the table. Default: the metrics of the rows.
        failures: Rates that together include each failure exactly once. Default: the metrics of the rows.
    """
    of_rows = rates_by_title(rows, titles)
    sizes = {title: [rate.n for rate in of_metric] for title, of_metric in (rates or of_rows).items() if of_metric}
    notes = judged_by(judges_of(rows, titles))
    return [*notes, f"{describe_counts('n = ', sizes)}.", failure_note(failures or of_rows)] if sizes else notes


def failure_note(rates: RatesByTitle) -> str:
    """Returns the note on failed answers and verdicts."""
    failed = {title: [sum(rate.failed for rate in of_metric)] for title, of_metric in rates.items()}
    failed = {title: counts for title, counts in failed.items() if counts != [0]}
    return f"{describe_counts('Failed answers or verdicts, over all models: ', failed)}." if failed else "None failed."


def describe_counts(prefix: str, counts_by_title: Mapping[str, Sequence[int]]) -> str:
    """Returns ``"n = 36 (ASR), 36 to 40 (SARR, Refusals)"`` for the prefix ``"n = "``.

    Titles with equal counts are listed together.
    """
    titles: dict[str, list[str]] = {}
    for title, counts in counts_by_title.items():
        low, high = min(counts), max(counts)
        titles.setdefault(f"{low:,}" if low == high else f"{low:,} to {high:,}", []).append(title)
    return prefix + ", ".join(f"{count} ({', '.join(names)})" for count, names in titles.items())
