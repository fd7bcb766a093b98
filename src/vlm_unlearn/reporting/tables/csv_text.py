"""A table as CSV (RFC 4180) for machines: unrounded numbers in the units of summary.json."""

from __future__ import annotations

import csv
import io
import re

from vlm_unlearn.reporting.tables.table import Cell, Raw, Table

# What makes spreadsheets take a text for a formula, full-width forms included.
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")


def csv_text(table: Table) -> str:
    """One line a number where the table says what its columns are, else one line a line.

    A text that a spreadsheet would take for a formula gets an apostrophe in front, and so does what follows a semicolon, at which
    spreadsheets of many countries split; numbers stay numbers, and what is missing is empty.
    """
    lines = _long(table) if table.across else [_joined(*line) for line in table.lines]
    headings = list(dict.fromkeys(key for line in lines for key in line))
    written = io.StringIO()
    sheet = csv.writer(written)
    sheet.writerow(headings)
    sheet.writerows([_guarded(line.get(key)) for key in headings] for line in lines)
    return written.getvalue()


def _long(table: Table) -> list[dict[str, Raw]]:
    found = []
    for line in table.lines:
        names = _joined(*(cell for cell, column in zip(line, table.columns, strict=True) if not column.numbers))
        for cell, column in zip(line, table.columns, strict=True):
            if column.numbers and cell is not None and cell.raw:
                found.append({**names, table.across: column.key, **cell.raw})
    return found


def _joined(*cells: Cell | None) -> dict[str, Raw]:
    joined: dict[str, Raw] = {}
    for cell in cells:
        joined |= cell.raw if cell is not None else {}
    return joined


def _guarded(value: Raw) -> Raw:
    if not isinstance(value, str):
        return value
    parts = re.sub(rf";( *)(?=[{re.escape(''.join(FORMULA))}])", r";\1'", value)
    return f"'{parts}" if value.lstrip(" ").startswith(FORMULA) else parts
