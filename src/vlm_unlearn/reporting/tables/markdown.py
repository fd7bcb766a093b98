"""Writes a table as GitHub-flavored Markdown, and escapes texts from data files."""

from __future__ import annotations

import re

from vlm_unlearn.reporting.tables.table import MISSING, Cell, Column, Table

MAX_LENGTH = 200  # characters per cell
# Characters with a meaning in Markdown. An underscore within a word has none.
MARKDOWN = re.compile(r"[\\`*~\[\]]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
# Characters with a meaning in HTML, on the Hugging Face hub or on GitHub (mentions, formulas, links).
HTML = re.compile(r"[|>&$@#]|<(?=[A-Za-z/!?])|:(?=\S)|(?<=www)\.", re.IGNORECASE)


def escaped(value: object, max_length: int = MAX_LENGTH) -> str:
    """Returns text that Markdown shows as it is, on one line, truncated to `max_length` characters."""
    text = " ".join(str(value)[: 10 * max_length].split())
    text = text if len(text) <= max_length else text[: max_length - 1] + "…"
    printable = "".join(character for character in text if character.isprintable())
    return MARKDOWN.sub(r"\\\g<0>", HTML.sub(lambda match: f"&#{ord(match.group())};", printable))


def markdown_table(table: Table, intervals: bool = True) -> str:
    """Returns the lines of the table without its caption."""
    best = table.best_cells()
    lines = [
        [_heading(column) for column in table.columns],
        ["---:" if column.numeric else "---" for column in table.columns],
    ]
    for number, line in enumerate(table.lines):
        lines.append([_cell(cell, (number, index) in best, intervals) for index, cell in enumerate(line)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def markdown(table: Table, intervals: bool = True) -> str:
    """Returns the table with its caption below."""
    return f"{markdown_table(table, intervals)}\n{escaped(table.caption(intervals), 10_000)}\n"


def _heading(column: Column) -> str:
    return escaped(f"{column.group} {column.heading}".strip())


def _cell(cell: Cell | None, best: bool, intervals: bool) -> str:
    if cell is None:
        return MISSING
    text = f"**{cell.text}**" if best else escaped(cell.text)
    failed = f", {cell.failed:,} failed" if cell.failed else ""
    return text + escaped(cell.mark) + (f" {cell.interval}" if intervals and cell.interval else "") + failed
