"""``vlm-unlearn report``: writes the report of one or several models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from vlm_unlearn.cli.common import (
    JSON_OPTION,
    RatesTable,
    Stages,
    print_assessments,
    print_json,
    result_console,
    status_console,
)
from vlm_unlearn.cli.image_folders import reads_images
from vlm_unlearn.cli.runs import named_runs
from vlm_unlearn.errors import printable

if TYPE_CHECKING:
    from vlm_unlearn.evaluation.generate import OnDone
    from vlm_unlearn.records import Summary
    from vlm_unlearn.reporting.robustness.files import RobustnessFiles


ROBUSTNESS_OPTION = typer.Option(
    None,
    "--robustness",
    metavar="DIR",
    help="Attacks on the models: a folder that robustness wrote, or a folder of such folders. May be repeated. "
    "robustness/NAME next to evaluations/NAME is used without this option.",
)


@reads_images
def report(
    runs: list[Path] = typer.Argument(
        ...,
        metavar="RUN...",
        help="Folders that evaluate wrote. A demo folder stands for all its models, demo/evaluations/NAME for one. "
        "Each model is compared with the first.",
    ),
    out: Path = typer.Option(
        ..., "--out", help="A folder for report.html, report/ and summary.json. A previous report is replaced."
    ),
    title: str = typer.Option("", "--title", help="Heading of the page. Default: the models' names, or their number."),
    robustness: list[Path] = ROBUSTNESS_OPTION,
    as_json: bool = JSON_OPTION,
) -> None:
    """Writes a page with assessments, plots, tables and all answers, of one or several models. It opens from disk.

    Examples:

      vlm-unlearn report evaluations/base evaluations/npo evaluations/rmu --out reports/unlearned

      vlm-unlearn report demo --out reports/demo --title "Both papers in miniature"
    """
    folders = named_runs(runs)
    with status_console().status("reading the runs"):
        from vlm_unlearn.reporting.report import validate_report_folder

        validate_report_folder(out)
    report_runs(out, folders, title, robustness or [], as_json)


def report_runs(out: Path, folders: dict[str, Path], title: str, robustness: list[Path], as_json: bool) -> None:
    """Compares runs with the first one, and writes and prints their report.

    Args:
        out: The folder of the report.
        folders: The evaluation folder of each model.
        title: The heading. Empty takes the names of the models, or their number.
        robustness: Folders with attacks on the models.
        as_json: Whether to print the summary as JSON.
    """
    with Stages() as stages:
        stages.wait("reading the runs")
        from vlm_unlearn.evaluation.comparison import summarize_runs
        from vlm_unlearn.reporting.robustness.files import find_robustness

        attacks = find_robustness(folders, robustness)
        summary, skipped = summarize_runs(folders, lambda done, total: stages.update("compare", done, total))
        models = list(folders)
        default_title = f"vlm-unlearn: {', '.join(models) if len(models) <= 4 else f'{len(models)} models'}"
        summary = count_attacks_in(summary, folders, attacks)
        page = save_report(out, summary, folders, title or default_title, skipped, stages.update, attacks)
    print_skipped(skipped)
    if as_json:
        print_json(summary.model_dump())
        return
    console = result_console()
    console.print(RatesTable(summary))
    print_assessments(console, summary.rows)
    console.print(printable(f"Report: {page}"), markup=False, highlight=False, soft_wrap=True)


def count_attacks_in(summary: Summary, folders: dict[str, Path], attacks: RobustnessFiles) -> Summary:
    """Returns the summary with assessments that count the attacks on the models."""
    from vlm_unlearn.evaluation.generate import saved_suite
    from vlm_unlearn.reporting.robustness.assessment import assess_with_attacks

    suites = {name: saved_suite(folder) for name, folder in folders.items() if name in attacks.by_model}
    return assess_with_attacks(summary, attacks.by_model, suites)


def save_report(
    out: Path,
    summary: Summary,
    folders: dict[str, Path],
    title: str,
    skipped: list[str],
    on_done: OnDone,
    attacks: RobustnessFiles | None = None,
) -> Path:
    """Writes the report and summary.json, and returns the page to open.

    Args:
        folders: The evaluation folder of each model.
        skipped: The comparisons that were not possible, each with its reason.
        on_done: Called with the stage, the number of finished steps, and their total.
        attacks: The results of attacks on the models.
    """
    from vlm_unlearn.reporting.report import write_report
    from vlm_unlearn.store import SUMMARY, lock_folder, write_json

    with lock_folder(out):
        page = write_report(out, summary, folders, title, left_out=skipped, on_done=on_done, robustness=attacks)
        # Last, so that an interrupted command leaves the previous report and summary as they were.
        write_json(out / SUMMARY, summary.model_dump())
    return page


def print_skipped(skipped: list[str]) -> None:
    """Lists the comparisons that were not possible on standard error."""
    notes = status_console()
    for reason in skipped:
        notes.print(printable(f"not compared: {reason}"), markup=False, highlight=False, soft_wrap=True)
