"""``vlm-unlearn table``: prints one table of finished runs."""

from __future__ import annotations

import sys
from pathlib import Path

import typer

from vlm_unlearn.reporting.tables import PRINTABLE_TABLES, TABLE_FORMATS


def table(
    runs: list[Path] = typer.Argument(
        ..., metavar="RUN...", help="Folders with a summary.json: evaluations, a demo, a report."
    ),
    name: str = typer.Option(
        "rates",
        "--table",
        help="rates, comparisons, published, labels, categories, rewrites, safety_mirage, safe_eraser, ...",
        autocompletion=lambda: list(PRINTABLE_TABLES),
    ),
    form: str = typer.Option(
        "md",
        "--format",
        metavar="md|tex|csv",
        help="Markdown, LaTeX (booktabs) or CSV.",
        autocompletion=lambda: list(TABLE_FORMATS),
    ),
    intervals: bool = typer.Option(
        True, "--intervals/--no-intervals", help="Print 95 % intervals. A CSV always has them."
    ),
) -> None:
    """Prints one table of finished runs, to paste into a paper or an issue. `report` writes all tables as files.

    Example:

      vlm-unlearn table evaluations/base evaluations/npo --table safety_mirage --format tex
    """
    from vlm_unlearn.errors import UserError, nearest, printable, quoted

    if form == "json":
        raise UserError(
            "prints no JSON. All numbers are in summary.json of the runs.", code="unknown-name", field="--format"
        )
    if form not in TABLE_FORMATS:
        raise UserError(
            f"no format {quoted(form)}{nearest(form, TABLE_FORMATS)}; available: {', '.join(TABLE_FORMATS)}",
            code="unknown-name",
            field="--format",
        )
    from vlm_unlearn.reporting.summaries import join_summaries
    from vlm_unlearn.reporting.tables.summary_tables import named_table, render_table
    from vlm_unlearn.store import replace_surrogates

    text = replace_surrogates(render_table(named_table(join_summaries(runs), name), form, intervals))
    # A CSV contains names unescaped, and a terminal might act on them.
    sys.stdout.write("\n".join(map(printable, text.split("\n"))) if sys.stdout.isatty() else text)
