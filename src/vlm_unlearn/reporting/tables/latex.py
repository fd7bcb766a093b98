r"""A table for a paper: LaTeX that needs no package but booktabs, and compiles with pdfTeX whatever the names in it are.

Numbers are flush right with the same decimals, so that they stand under each other; a mark takes no room. Intervals stand in small
print below, which keeps the columns narrow.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from vlm_unlearn.reporting.tables.table import NOTHING, Cell, Column, Table

LONGEST = 60  # characters of one cell
WIDE = 7  # columns from which a table spans both columns of a page
NARROW = 4  # columns up to which it has room for larger print
CAPTION = 2000  # characters of a caption: TeX measures it as one line, and no line may be wider than 5.7 m
LINES = 36  # printed lines that a page holds
FLOATS = 15  # LaTeX can keep 18 waiting, and stops with an error beyond
SPECIAL = {
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
    "ß": r"\ss{}",
    "æ": r"\ae{}",
    "Æ": r"\AE{}",
    "œ": r"\oe{}",
    "Œ": r"\OE{}",
    "ø": r"\o{}",
    "Ø": r"\O{}",
    "ł": r"\l{}",
    "Ł": r"\L{}",
    "ı": r"\i{}",
    **{
        character: f"{{{character}}}" for character in "*[]"
    },  # at the head of a line they would belong to the line end before
    **{character: f"\\{character}" for character in "_%&#${}"},
}
JOINED = {"--", "``", "''", ",,", "?`", "!`"}  # two marks that TeX would set as another one
ACCENTS = {
    "\u0300": "`",
    "\u0301": "'",
    "\u0302": "^",
    "\u0303": "~",
    "\u0304": "=",
    "\u0306": "u",
    "\u0307": ".",
    "\u0308": '"',
    "\u030a": "r",
    "\u030b": "H",
    "\u030c": "v",
    "\u0327": "c",
}


def escaped(value: object, longest: int = LONGEST) -> str:
    """Text that TeX prints and never acts on; letters that a plain installation has no form for are named as U+4E2D."""
    text = " ".join(str(value)[: 10 * longest].split())
    cut = text if len(text) <= longest else text[: longest - 1] + "…"
    return "".join(_character(before, character) for before, character in zip(" " + cut, cut, strict=False))


def latex(table: Table, intervals: bool = True) -> str:
    r"""The table as a float with caption and ``\label{tab:NAME}``; of more lines than a page holds as several: ``tab:NAME-2`` and on."""
    per_float = (
        LINES // 2 if intervals and any(cell and cell.interval for line in table.lines for cell in line) else LINES
    )
    starts = range(0, max(1, len(table.lines)), per_float)
    floats = [
        _float(table, range(start, min(start + per_float, len(table.lines))), number, len(starts), intervals)
        for number, start in enumerate(starts, start=1)
    ]
    pages = ["\n".join(floats[start : start + FLOATS]) for start in range(0, len(floats), FLOATS)]
    return "\n".join([r"% Needs \usepackage{booktabs}.", "\\clearpage\n".join(pages)])


def _float(table: Table, lines: range, number: int, of: int, intervals: bool) -> str:
    name = "table*" if len(table.columns) >= WIDE else "table"
    spec = "".join("r" if column.numbers else "l" for column in table.columns)
    size = [r"\small"] if len(table.columns) <= NARROW else [r"\footnotesize", r"\setlength{\tabcolsep}{3pt}"]
    first = number == 1
    caption = (table.caption(intervals) if first else table.title) + (f" Part {number} of {of}." if of > 1 else "")
    return "\n".join(
        [
            rf"\begin{{{name}}}[tp]",
            r"\centering",
            rf"\caption{{{escaped(caption, CAPTION)}}}",
            rf"\label{{tab:{table.name.replace('_', '-')}{'' if first else f'-{number}'}}}",
            r"\vspace{4pt}",
            *size,
            rf"\begin{{tabular}}{{@{{}}{spec}@{{}}}}",
            r"\toprule",
            *_head(table.columns),
            r"\midrule",
            *_body(table, lines, intervals),
            r"\bottomrule",
            r"\end{tabular}",
            rf"\end{{{name}}}",
            "",
        ]
    )


def _character(before: str, character: str) -> str:
    if character == '"':
        return "``" if before in " (" else "''"
    if character in SPECIAL:
        return SPECIAL[character]
    if character.isascii() and character.isprintable():
        return f"{{}}{character}" if before + character in JOINED else character
    letter, *accents = list(unicodedata.normalize("NFD", character))
    if letter.isascii() and letter.isalpha() and len(accents) == 1 and accents[0] in ACCENTS:
        return f"\\{ACCENTS[accents[0]]}{{{letter}}}"
    return f"{{U+{ord(character):04X}}}"


def _head(columns: Sequence[Column]) -> list[str]:
    """Groups over their columns with a rule between, or the first words of long headings; below them the headings."""
    groups = _groups(columns)
    stacked = [("", column.heading) if column.group else _stacked(column) for column in columns]
    above = [
        rf"\multicolumn{{{span}}}{{c}}{{{escaped(name)}}}"
        if name
        else " & ".join(escaped(first) for first, _ in stacked[start - 1 : start - 1 + span])
        for name, start, span in groups
    ]
    rules = " ".join(rf"\cmidrule(lr){{{start}-{start + span - 1}}}" for name, start, span in groups if name)
    lines = [_line(above)] if any(name for name, _, _ in groups) or any(first for first, _ in stacked) else []
    return [*lines, *([rules] if rules else []), _line([escaped(last) for _, last in stacked])]


def _groups(columns: Sequence[Column]) -> list[tuple[str, int, int]]:
    """Name, first column (from 1) and width of each run of columns with one group."""
    found: list[tuple[str, int, int]] = []
    for number, column in enumerate(columns, start=1):
        if found and found[-1][0] == column.group:
            name, start, span = found[-1]
            found[-1] = (name, start, span + 1)
        else:
            found.append((column.group, number, 1))
    return found


def _stacked(column: Column) -> tuple[str, str]:
    first, blank, rest = column.heading.partition(" ")
    return (first, rest) if column.numbers and blank and len(column.heading) > 9 else ("", column.heading)


def _body(table: Table, numbers: range, intervals: bool) -> list[str]:
    best = table.best()
    written = []
    for number in numbers:
        line = table.lines[number]
        below = [_interval(cell) if intervals else "" for cell in line]
        if any(below) and number != numbers.start:
            written.append(r"\addlinespace[2pt]")
        shown = [_cell(cell, (number, at) in best) for at, cell in enumerate(line)]
        if number != numbers.start and not table.columns[1].numbers and line[0] == table.lines[number - 1][0]:
            shown[0] = ""  # the outer of two names is said once
        above = _line(shown)
        written += [f"{above}[-2pt]", _line(below)] if any(below) else [above]
    return written


def _cell(cell: Cell | None, best: bool) -> str:
    if cell is None:
        return escaped(NOTHING)
    text = escaped(cell.text)
    if cell.text.startswith("-") and cell.text[1:].replace(".", "", 1).isdigit():
        text = f"$-${escaped(cell.text[1:])}"
    return (rf"\textbf{{{text}}}" if best else text) + (rf"\rlap{{$^{{{cell.mark}}}$}}" if cell.mark else "")


def _interval(cell: Cell | None) -> str:
    return rf"{{\tiny {cell.interval.replace('-', '$-$')}}}" if cell is not None and cell.interval else ""


def _line(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"
