"""``vlm-unlearn compare``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from vlm_unlearn.cli.common import JSON_OPTION, Stages, plain, print_json, result_console, status_console

if TYPE_CHECKING:
    from rich.table import Table

    from vlm_unlearn.records import Summary


def compare(
    base: Path = typer.Argument(..., metavar="BASE_RUN", help="A folder that evaluate wrote, or generate and judge."),
    runs: list[Path] = typer.Argument(..., metavar="RUN...", help="Further ones; each is compared to the first."),
    out: Path = typer.Option(None, "--out", help="A folder for comparison.json and report.html."),
    as_json: bool = JSON_OPTION,
) -> None:
    """Says what changed from one model to others on the same prompts, and whether it could be chance.

    Example:

      vlm-unlearn compare evaluations/base evaluations/npo evaluations/rmu --out comparisons/unlearned
    """
    from vlm_unlearn.errors import RequestError
    from vlm_unlearn.evaluation.comparing import compare_runs

    folders = {name: run for run, name in zip([base, *runs], _names([base, *runs]), strict=True)}
    if out is not None and (out / "manifest.json").exists():
        raise RequestError(f"{out}: holds a run; choose another folder for the comparison")
    notes = status_console()
    with Stages() as stages:
        stages.wait("comparing")
        summary, left_out = compare_runs(folders, lambda done, total: stages.update("compare", done, total))
    if out is not None:
        with notes.status("writing the report"):
            from vlm_unlearn.reporting.report import write_report
            from vlm_unlearn.store import write_json

            write_json(out / "comparison.json", summary.model_dump())
            write_report(out, summary, folders, f"vlm-unlearn: changes against {summary.rows[0].model}")
    for reason in left_out:
        notes.print(f"not compared: {reason}", markup=False, highlight=False)
    if as_json:
        print_json(summary.model_dump())
        return
    console = result_console()
    console.print(_table(summary, console.width))
    if out is not None:
        console.print(f"Report: {out / 'report.html'}", markup=False, highlight=False)


def _names(runs: Sequence[Path]) -> list[str]:
    """The models' names in the runs' summaries, else the folders', or where two are the same, the folders' paths.

    Raises:
        RequestError: a run is given twice.
    """
    from vlm_unlearn.errors import RequestError

    whole = [run.resolve() for run in runs]
    twice = next((run for run in runs if whole.count(run.resolve()) > 1), None)
    if twice is not None:
        raise RequestError(f"{twice}: is given twice; name each run once")
    short = [_name(run) for run in whole]
    return short if len(set(short)) == len(short) else [str(run) for run in runs]


def _name(run: Path) -> str:
    from vlm_unlearn.store import read_json

    try:
        return str(read_json(run / "summary.json")["rows"][0]["model"])
    except Exception:  # no summary, or another's
        return run.name


def _table(summary: Summary, width: int) -> Table:
    """One line a comparison; a narrow terminal is shown what matters most of it."""
    from rich import box
    from rich.table import Table

    from vlm_unlearn.reporting.words import change, notes

    caption = "\n".join(plain(note) for note in notes(summary, []))
    table = Table(box=box.SIMPLE_HEAVY, caption=caption, caption_justify="left", caption_style="")
    for heading in ("model", "metric"):
        table.add_column(heading, overflow="fold")
    headings = ("change", "95 % interval", "p after Holm", "test", "pairs", "unpaired")[: None if width >= 100 else 3 if width >= 76 else 2]
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
        table.add_row(plain(comparison.model), plain(comparison.metric), *cells[: len(headings)])
    return table
