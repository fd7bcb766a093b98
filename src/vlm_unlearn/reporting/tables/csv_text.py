"""Writes a table as CSV (RFC 4180) with unrounded numbers in the units of summary.json."""

from __future__ import annotations

import csv
import io
import re

from vlm_unlearn.reporting.tables.table import Cell, CsvValue, Table

# First characters of texts that spreadsheets interpret as a formula, including full-width forms.
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")


def csv_text(table: Table) -> str:
    """Returns the table as CSV, in long form (one line per number) if `table.variable` is set.

    Numbers are not quoted, and missing values are empty. A text that a spreadsheet would interpret as a formula gets an
    apostrophe in front. The same applies to a text after a semicolon, because spreadsheets with some locales split
    there.
    """
    lines = _long_form(table) if table.variable else [_merge_values(*line) for line in table.lines]
    headings = list(dict.fromkeys(key for line in lines for key in line))
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(headings)
    writer.writerows([_escape_formula(line.get(key)) for key in headings] for line in lines)
    return text.getvalue()


def _long_form(table: Table) -> list[dict[str, CsvValue]]:
    lines = []
    for line in table.lines:
        names = _merge_values(*(cell for cell, column in zip(line, table.columns, strict=True) if not column.numeric))
        for cell, column in zip(line, table.columns, strict=True):
            if column.numeric and cell is not None and cell.csv_values:
                lines.append({**names, table.variable: column.key, **cell.csv_values})
    return lines


def _merge_values(*cells: Cell | None) -> dict[str, CsvValue]:
    values: dict[str, CsvValue] = {}
    for cell in cells:
        values |= cell.csv_values if cell is not None else {}
    return values


def _escape_formula(value: CsvValue) -> CsvValue:
    if not isinstance(value, str):
        return value
    escaped = re.sub(rf";( *)(?=[{re.escape(''.join(FORMULA_STARTS))}])", r";\1'", value)
    return f"'{escaped}" if value.lstrip(" ").startswith(FORMULA_STARTS) else escaped
