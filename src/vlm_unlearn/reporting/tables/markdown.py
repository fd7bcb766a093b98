"""A table as GitHub shows it, and text of others that stays text in Markdown."""

from __future__ import annotations

import re

from vlm_unlearn.reporting.tables.table import NOTHING, Cell, Column, Table

LONGEST = 200  # characters of one cell
# What Markdown acts on, and what HTML, the hub and GitHub (mentions, formulas, links) do; within a word an underscore is plain text.
MARKDOWN = re.compile(r"[\\`*~\[\]]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
OTHERS = re.compile(r"[|>&$@#]|<(?=[A-Za-z/!?])|:(?=\S)|(?<=www)\.", re.IGNORECASE)


def escaped(value: object, longest: int = LONGEST) -> str:
    """Text that stays inside its table cell, heading or sentence, whatever a file said."""
    text = " ".join(str(value)[: 10 * longest].split())
    cut = text if len(text) <= longest else text[: longest - 1] + "…"
    printable = "".join(character for character in cut if character.isprintable())
    return MARKDOWN.sub(r"\\\g<0>", OTHERS.sub(lambda found: f"&#{ord(found.group())};", printable))


def markdown_table(table: Table, intervals: bool = True) -> str:
    """The lines of the table alone, for a page that says the rest itself."""
    best = table.best()
    lines = [
        [_heading(column) for column in table.columns],
        ["---:" if column.numbers else "---" for column in table.columns],
    ]
    for number, line in enumerate(table.lines):
        lines.append([_cell(cell, (number, at) in best, intervals) for at, cell in enumerate(line)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def markdown(table: Table, intervals: bool = True) -> str:
    """The table with its caption below, as a file of its own."""
    return f"{markdown_table(table, intervals)}\n{escaped(table.caption(intervals), 10_000)}\n"


def _heading(column: Column) -> str:
    return escaped(f"{column.group} {column.heading}".strip())


def _cell(cell: Cell | None, best: bool, intervals: bool) -> str:
    if cell is None:
        return NOTHING
    text = f"**{cell.text}**" if best else escaped(cell.text)
    failed = f", {cell.failed:,} failed" if cell.failed else ""
    return text + escaped(cell.mark) + (f" {cell.interval}" if intervals and cell.interval else "") + failed
