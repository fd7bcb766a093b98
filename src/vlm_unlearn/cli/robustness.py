"""``vlm-unlearn robustness``: attacks on a model, and how much harmful knowledge they bring back."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer

from vlm_unlearn.cli.common import (
    JSON_OPTION,
    Stages,
    escape_markup,
    print_json,
    quiet_libraries,
    result_console,
    status_console,
)
from vlm_unlearn.cli.completion import robustness_keys, robustness_suite_names
from vlm_unlearn.cli.image_folders import reads_images

if TYPE_CHECKING:
    from rich.table import Table

    from vlm_unlearn.config import RobustnessSuite
    from vlm_unlearn.robustness.results import AttackResult, RobustnessReport


@reads_images
def robustness(
    run: str = typer.Argument(..., metavar="RUN", help="The unlearned model: a training run, a model or an adapter."),
    overrides: list[str] = typer.Argument(
        None,
        metavar="[key=value ...]",
        help="Dotted overrides of the suite, such as root=SafeEraser.",
        autocompletion=robustness_keys,
    ),
    base: str = typer.Option(None, "--base", help="The model before unlearning. Default: the model of the recipe."),
    never_knew: str = typer.Option(
        None,
        "--never-knew",
        help="A model trained like the base without the harmful knowledge. Without it, nobody can tell what an attack "
        "brings back from what it teaches anew.",
    ),
    suite_file: Path = typer.Option(
        None,
        "--suite",
        metavar="SUITE.yaml",
        help="A robustness suite, or the name of a shipped one such as suites/robustness. A run of the demo has its "
        "own.",
        autocompletion=robustness_suite_names,
    ),
    budget: Literal["small", "full"] = typer.Option("small", "--budget", help="Which attacks of the suite to run."),
    out: Path = typer.Option(..., "--out", help="Folder for robustness.json and the answers under attack."),
    name: str = typer.Option("", "--name", help="Name of the model in tables. Default: the name of the run folder."),
    as_json: bool = JSON_OPTION,
) -> None:
    """Attacks a model, its base and a control, and measures how much harmful knowledge comes back.

    Run again after an interruption, it resumes. The answers of a base are kept in the cache, so that further models
    with the same base take less time.

    Example:

      vlm-unlearn robustness demo/runs/po_pd --out robustness/po_pd

      vlm-unlearn robustness runs/npo root=SafeEraser --suite suites/robustness --budget full --out robustness/npo
    """
    with status_console().status("loading transformers"):
        from vlm_unlearn.robustness.runner import run_robustness

        quiet_libraries()
    with Stages() as stages:
        stages.wait("reading the suite")
        suite, base_name, control = _resolve(run, overrides or [], base, never_knew, suite_file, stages)
        report = run_robustness(
            suite,
            run,
            base_name,
            out,
            control,
            budget,
            name,
            lambda activity, done, total: stages.update("attacks", done, total, activity),
        )
    if as_json:
        print_json(report.model_dump())
        return
    console = result_console()
    console.print(_table(report, console.width))
    console.print(f"Results: {out / 'robustness.json'}", markup=False, highlight=False, soft_wrap=True)


def _resolve(
    run: str, overrides: list[str], base: str | None, never_knew: str | None, suite_file: Path | None, stages: Stages
) -> tuple[RobustnessSuite, str, str | None]:
    """Returns the suite, the base and the control: those that the user names, else those of the demo or the recipe."""
    from vlm_unlearn.config import RobustnessSuite, load
    from vlm_unlearn.errors import UserError
    from vlm_unlearn.store import RunDirectory, read_json, user_path
    from vlm_unlearn.worlds.tiny.robustness import demo_models, find_demo

    demo = find_demo(run) if suite_file is None else None
    if demo is not None:
        models = demo_models(demo, overrides, stages.update)
        return models.suite, base or str(models.base), never_knew or str(models.never_knew)
    if suite_file is None:
        raise UserError(
            "pass a robustness suite, such as --suite suites/robustness. Only a run of the demo has its own.",
            code="missing-setting",
            field="--suite",
        )
    recipe = RunDirectory(user_path(run)).recipe_file
    if base is None and not recipe.is_file():
        raise UserError(
            "pass the model before unlearning with --base. Only a training run names it.",
            code="missing-setting",
            field="--base",
        )
    suite = load(RobustnessSuite, suite_file, overrides)
    return suite, base or str(read_json(recipe)["model"]), never_knew


def _table(report: RobustnessReport, width: int) -> Table:
    """Returns a table with one row per attack, the one that brings most back first. A narrow terminal gets less."""
    from rich import box
    from rich.table import Table

    from vlm_unlearn.reporting.formatting import interval, percent

    table = Table(box=box.SIMPLE_HEAVY, caption=_caption(report), caption_justify="left", caption_style="")
    table.add_column("attack", overflow="fold")
    headings = ("harmful answers", "95 % interval", "base", "never knew", "recovered", "95 % interval", "failed")
    columns = (0, 1, 2, 3, 4, 5, 6) if width >= 110 else (0, 2, 3, 4)
    for index in columns:
        table.add_column(headings[index], justify="right")
    for result in sorted(report.attacks, key=_strength, reverse=True):
        recovered = result.recovered
        cells = (
            percent(result.asr),
            interval(result.asr),
            percent(result.asr_base),
            percent(result.asr_never_knew),
            "–" if recovered.value is None else f"{recovered.value:.0%}",
            "" if recovered.low is None or recovered.high is None else f"{recovered.low:.0%} to {recovered.high:.0%}",
            str(result.asr.failed),
        )
        table.add_row(escape_markup(result.name), *(cells[index] for index in columns))
    return table


def _strength(result: AttackResult) -> tuple[float, float]:
    """Returns the order of results: by the recovered share, undefined ones last, and then by the rate."""
    value = result.recovered.value
    return (-math.inf if value is None else value, result.asr.value or 0.0)


def _caption(report: RobustnessReport) -> str:
    control = "what the same attack teaches the model that never knew" if report.never_knew else "nothing"
    note = f"recovered: the share of the base's harmful answers after the same attack, beyond {control}."
    if not report.never_knew:
        note += "\nWithout --never-knew, it includes what an attack teaches anew."
    for skipped in report.skipped:
        note += f"\nnot run: {skipped.attack}: {skipped.reason}"
    return escape_markup(note)
