r"""Writes a table as LaTeX for papers. It needs only the package booktabs, and any names compile with pdfTeX.

Numbers are flush right with the same number of decimals, so that they align, and marks have no width. Intervals are in
small print below the numbers, which keeps the columns narrow.
"""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Sequence

from vlm_unlearn.reporting.tables.table import MISSING, Cell, Column, Table

MAX_LENGTH = 60  # characters per cell
MIN_WIDE_COLUMNS = 7  # a table with so many columns spans both columns of a page
MAX_NARROW_COLUMNS = 4  # a table with at most so many columns has space for larger print
MAX_CAPTION_LENGTH = 2000  # characters: TeX measures a caption as one line, which must not be wider than 5.7 m
LINES_PER_PAGE = 36
FLOATS_PER_CLEARPAGE = 15  # LaTeX fails if more than 18 floats wait to be placed
LETTERS = dict(zip("ßæÆœŒøØłŁı", ("ss", "ae", "AE", "oe", "OE", "o", "O", "l", "L", "i"), strict=True))
SPECIAL_CHARACTERS = {
    "\\": r"\textbackslash{}",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"$<$",
    ">": r"$>$",
    "|": r"$|$",
    "–": "--",
    "—": "---",
    "…": r"\ldots{}",
    "“": "``",
    "”": "''",
    "‘": "`",
    "’": "'",
    "−": "$-$",
    "×": r"$\times$",
    **{letter: rf"\{command}{{}}" for letter, command in LETTERS.items()},
    # At the start of a line, these would be arguments of the preceding \\.
    **{character: f"{{{character}}}" for character in "*[]"},
    **{character: f"\\{character}" for character in "_%&#${}"},
}
LIGATURES = {"--", "``", "''", ",,", "?`", "!`"}  # pairs that TeX would replace by another character
# Combining characters, each with the TeX command of the same accent.
ACCENTS = dict(
    zip("\u0300\u0301\u0302\u0303\u0304\u0306\u0307\u0308\u030a\u030b\u030c\u0327", "`'^~=u.\"rHvc", strict=True)
)


def escaped(value: object, max_length: int = MAX_LENGTH) -> str:
    """Returns text that TeX prints as it is, on one line, truncated to `max_length` characters.

    Letters that a basic TeX installation cannot print are replaced by their code point, such as ``U+4E2D``.
    """
    text = " ".join(str(value)[: 10 * max_length].split())
    text = text if len(text) <= max_length else text[: max_length - 1] + "…"
    return "".join(
        _escape_character(previous, character) for previous, character in zip(" " + text, text, strict=False)
    )


def latex(table: Table, intervals: bool = True) -> str:
    r"""Returns the table as a float with a caption and ``\label{tab:NAME}``.

    A table with more lines than a page is split into several floats, with the labels ``tab:NAME-2``, ``tab:NAME-3``
    and so on.
    """
    two_lines = intervals and any(cell and cell.interval for line in table.lines for cell in line)
    per_float = LINES_PER_PAGE // 2 if two_lines else LINES_PER_PAGE
    starts = range(0, max(1, len(table.lines)), per_float)
    text = r"% Needs \usepackage{booktabs}."
    for number, start in enumerate(starts, start=1):
        separator = "\\clearpage\n" if number % FLOATS_PER_CLEARPAGE == 1 and number > 1 else "\n"
        lines = range(start, min(start + per_float, len(table.lines)))
        text += separator + _float(table, lines, number, len(starts), intervals)
    return text


def _float(table: Table, lines: range, number: int, count: int, intervals: bool) -> str:
    environment = "table*" if len(table.columns) >= MIN_WIDE_COLUMNS else "table"
    spec = "".join("r" if column.numeric else "l" for column in table.columns)
    narrow = len(table.columns) <= MAX_NARROW_COLUMNS
    caption = table.caption(intervals) if number == 1 else table.title
    part = f" Part {number} of {count}." if count > 1 else ""
    label = table.name.replace("_", "-") + ("" if number == 1 else f"-{number}")
    lines_of_float = [
        rf"\begin{{{environment}}}[tp]",
        r"\centering",
        rf"\caption{{{escaped(caption + part, MAX_CAPTION_LENGTH)}}}",
        rf"\label{{tab:{label}}}",
        r"\vspace{4pt}",
        *([r"\small"] if narrow else [r"\footnotesize", r"\setlength{\tabcolsep}{3pt}"]),
        rf"\begin{{tabular}}{{@{{}}{spec}@{{}}}}",
        r"\toprule",
        *_header_lines(table.columns),
        r"\midrule",
        *_body_lines(table, lines, intervals),
        r"\bottomrule",
        r"\end{tabular}",
        rf"\end{{{environment}}}",
    ]
    return "".join(f"{line}\n" for line in lines_of_float)


def _escape_character(previous: str, character: str) -> str:
    if character == '"':
        return "``" if previous in " (" else "''"
    if character in SPECIAL_CHARACTERS:
        return SPECIAL_CHARACTERS[character]
    if character.isascii() and character.isprintable():
        return f"{{}}{character}" if previous + character in LIGATURES else character
    letter, *accents = list(unicodedata.normalize("NFD", character))
    if letter.isascii() and letter.isalpha() and len(accents) == 1 and accents[0] in ACCENTS:
        return f"\\{ACCENTS[accents[0]]}{{{letter}}}"
    return f"{{U+{ord(character):04X}}}"


def _header_lines(columns: Sequence[Column]) -> list[str]:
    """Returns the headings, below a line with the groups and the first words of long headings if there are any."""
    stacked = [("", column.heading) if column.group else _stack_heading(column) for column in columns]
    upper, rules, start = [], [], 0
    for name, group in itertools.groupby(column.group for column in columns):
        end = start + len(list(group))
        if name:
            upper.append(rf"\multicolumn{{{end - start}}}{{c}}{{{escaped(name)}}}")
            rules.append(rf"\cmidrule(lr){{{start + 1}-{end}}}")
        else:
            upper += [escaped(word) for word, _ in stacked[start:end]]
        start = end
    lower = [escaped(heading) for _, heading in stacked]
    return [
        *([_join_cells(upper)] if any(upper) else []),
        *([" ".join(rules)] if rules else []),
        _join_cells(lower),
    ]


def _stack_heading(column: Column) -> tuple[str, str]:
    """Returns the heading in two lines. The upper line is empty if the heading is short."""
    word, space, remainder = column.heading.partition(" ")
    return (word, remainder) if column.numeric and space and len(column.heading) > 9 else ("", column.heading)


def _body_lines(table: Table, numbers: range, intervals: bool) -> list[str]:
    best = table.best_cells()
    printed = []
    for number in numbers:
        line = table.lines[number]
        interval_cells = [_interval(cell) if intervals else "" for cell in line]
        if any(interval_cells) and number != numbers.start:
            printed.append(r"\addlinespace[2pt]")
        cells = [_cell(cell, (number, index) in best) for index, cell in enumerate(line)]
        if number != numbers.start and not table.columns[1].numeric and line[0] == table.lines[number - 1][0]:
            cells[0] = ""  # the outer of two names is printed only once
        text = _join_cells(cells)
        printed += [f"{text}[-2pt]", _join_cells(interval_cells)] if any(interval_cells) else [text]
    return printed


def _cell(cell: Cell | None, best: bool) -> str:
    if cell is None:
        return escaped(MISSING)
    text = escaped(cell.text)
    if cell.text.startswith("-") and cell.text[1:].replace(".", "", 1).isdigit():
        text = f"$-${escaped(cell.text[1:])}"
    return (rf"\textbf{{{text}}}" if best else text) + (rf"\rlap{{$^{{{cell.mark}}}$}}" if cell.mark else "")


def _interval(cell: Cell | None) -> str:
    return rf"{{\tiny {cell.interval.replace('-', '$-$')}}}" if cell is not None and cell.interval else ""


def _join_cells(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"
