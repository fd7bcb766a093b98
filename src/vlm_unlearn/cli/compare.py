"""``vlm-unlearn compare``: paired differences between models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from vlm_unlearn.cli.common import JSON_OPTION, Stages, escape_markup, print_json, result_console
from vlm_unlearn.cli.image_folders import reads_images
from vlm_unlearn.cli.report import ROBUSTNESS_OPTION, count_attacks_in, print_skipped, save_report
from vlm_unlearn.cli.runs import named_runs
from vlm_unlearn.errors import printable

if TYPE_CHECKING:
    from rich.table import Table

    from vlm_unlearn.records import Summary


@reads_images
def compare(
    base: Path = typer.Argument(
        ..., metavar="BASE_RUN", help="The base: a folder that evaluate wrote, or generate and judge."
    ),
    runs: list[Path] = typer.Argument(..., metavar="RUN...", help="Other evaluations. Each is compared with the base."),
    out: Path = typer.Option(None, "--out", help="A folder for summary.json and report.html."),
    robustness: list[Path] = ROBUSTNESS_OPTION,
    as_json: bool = JSON_OPTION,
) -> None:
    """Compares models on the same prompts: differences from the base, with 95 % intervals and paired tests.

    Example:

      vlm-unlearn compare evaluations/base evaluations/npo evaluations/rmu --out comparisons/unlearned
    """
    from vlm_unlearn.evaluation.comparison import compare_runs

    folders = named_runs([base, *runs])
    if out is not None:
        from vlm_unlearn.reporting.report import validate_report_folder

        validate_report_folder(out)
    with Stages() as stages:
        stages.wait("comparing")
        from vlm_unlearn.reporting.robustness.files import find_robustness

        attacks = find_robustness(folders, robustness or [])
        summary, skipped = compare_runs(folders, lambda done, total: stages.update("compare", done, total))
        summary = count_attacks_in(summary, folders, attacks)
        if out is not None:
            title = f"vlm-unlearn: changes against {summary.rows[0].model}"
            save_report(out, summary, folders, title, skipped, stages.update, attacks)
    print_skipped(skipped)
    if as_json:
        print_json(summary.model_dump())
        return
    console = result_console()
    console.print(_table(summary, console.width))
    if out is not None:
        console.print(printable(f"Report: {out / 'report.html'}"), markup=False, highlight=False, soft_wrap=True)


def _table(summary: Summary, width: int) -> Table:
    """Returns a table with one row per comparison. A narrow terminal gets only the most important columns."""
    from rich import box
    from rich.table import Table

    from vlm_unlearn.reporting.formatting import change, notes

    caption = "\n".join(escape_markup(note) for note in notes(summary, []))
    table = Table(box=box.SIMPLE_HEAVY, caption=caption, caption_justify="left", caption_style="")
    for heading in ("model", "metric"):
        table.add_column(heading, overflow="fold")
    headings = ("change", "95 % interval", "p after Holm", "test", "pairs", "unpaired")[
        : None if width >= 100 else 3 if width >= 76 else 2
    ]
    for heading in headings:
        table.add_column(heading, justify="right")
    for comparison in summary.comparisons:
        cells = (
            change(comparison),
            f"{100 * comparison.low:+.1f}, {100 * comparison.high:+.1f}",
            f"{comparison.p_adjusted:.2g}",
            comparison.test,
            str(comparison.n),
            str(comparison.unpaired),
        )
        table.add_row(escape_markup(comparison.model), escape_markup(comparison.metric), *cells[: len(headings)])
    return table
