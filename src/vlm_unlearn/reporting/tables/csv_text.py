"""Writes a table as CSV (RFC 4180) with unrounded numbers in the units of summary.json."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable

from vlm_unlearn.reporting.tables.table import Cell, CsvValue, Table

# First characters of texts that spreadsheets interpret as a formula, including full-width forms.
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")


def csv_text(table: Table) -> str:
    """Returns the table as CSV, in long form (one line per number) if `table.variable` is set.

    Numbers are not quoted, and missing values are empty. A text that a spreadsheet would interpret as a formula gets an
    apostrophe in front. The same applies to a text after a semicolon, because spreadsheets with some locales split
    there.
    """
    lines = []
    for line in table.lines:
        cells = [(column, cell) for column, cell in zip(table.columns, line, strict=True) if cell is not None]
        texts, numbers = ([pair for pair in cells if pair[0].numeric is numeric] for numeric in (False, True))
        if table.variable:
            names = _merged(cell for _, cell in texts)
            filled = ((column, cell) for column, cell in numbers if cell.csv_values)
            lines += [{**names, table.variable: column.key, **cell.csv_values} for column, cell in filled]
        else:
            lines.append(_merged(cell for _, cell in cells))
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for line in lines for key in line)))
    writer.writeheader()
    writer.writerows({key: _escape_formula(value) for key, value in line.items()} for line in lines)
    return text.getvalue()


def _merged(cells: Iterable[Cell]) -> dict[str, CsvValue]:
    return {key: value for cell in cells for key, value in cell.csv_values.items()}


def _escape_formula(value: CsvValue) -> CsvValue:
    if not isinstance(value, str):
        return value
    escaped = re.sub(rf";( *)(?=[{re.escape(''.join(FORMULA_STARTS))}])", r";\1'", value)
    return f"'{escaped}" if value.lstrip(" ").startswith(FORMULA_STARTS) else escaped
