"""``vlm-unlearn report``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from vlm_unlearn.cli.common import (
    JSON_OPTION,
    RatesTable,
    Stages,
    print_json,
    print_verdicts,
    result_console,
    status_console,
)
from vlm_unlearn.cli.runs import named_runs
from vlm_unlearn.errors import printable

if TYPE_CHECKING:
    from vlm_unlearn.evaluation.generate import OnDone
    from vlm_unlearn.records import Summary


def report(
    runs: list[Path] = typer.Argument(
        ...,
        metavar="RUN...",
        help="Folders that evaluate wrote; a demo's is all its models, demo/evaluations/NAME one. All are compared to the first.",
    ),
    out: Path = typer.Option(
        ..., "--out", help="A folder for report.html, report/ and summary.json; a report of before is written anew."
    ),
    title: str = typer.Option("", "--title", help="The page's heading; default: the models' names, or how many."),
    as_json: bool = JSON_OPTION,
) -> None:
    """Writes a page that opens from disk, with verdicts, plots, tables and all answers, of one model or of several beside each other.

    Examples:

      vlm-unlearn report evaluations/base evaluations/npo evaluations/rmu --out reports/unlearned

      vlm-unlearn report demo --out reports/demo --title "Both papers in miniature"
    """
    folders = named_runs(runs)
    with Stages() as stages:
        stages.wait("reading the runs")
        from vlm_unlearn.evaluation.comparison import summarize_runs
        from vlm_unlearn.reporting.report import validate_report_folder

        validate_report_folder(out)
        summary, left_out = summarize_runs(folders, lambda done, total: stages.update("compare", done, total))
        page = save_report(out, summary, folders, title or _title(list(folders)), left_out, stages.update)
    show_left_out(left_out)
    if as_json:
        print_json(summary.model_dump())
        return
    console = result_console()
    console.print(RatesTable(summary))
    print_verdicts(console, summary.rows, folders)
    console.print(printable(f"Report: {page}"), markup=False, highlight=False, soft_wrap=True)


def _title(models: list[str]) -> str:
    return f"vlm-unlearn: {', '.join(models) if len(models) <= 4 else f'{len(models)} models'}"


def save_report(
    out: Path, summary: Summary, folders: dict[str, Path], title: str, left_out: list[str], on_done: OnDone
) -> Path:
    """Writes the report and summary.json; returns the page to open."""
    from vlm_unlearn.reporting.report import write_report
    from vlm_unlearn.store import lock_folder, write_json

    with lock_folder(out):
        page = write_report(out, summary, folders, title, left_out=left_out, on_done=on_done)
        write_json(
            out / "summary.json", summary.model_dump()
        )  # last: a report that was cut short stays the one of before
    return page


def show_left_out(left_out: list[str]) -> None:
    """Says what was not compared, on standard error."""
    notes = status_console()
    for reason in left_out:
        notes.print(printable(f"not compared: {reason}"), markup=False, highlight=False, soft_wrap=True)
