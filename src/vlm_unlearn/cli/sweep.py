"""``vlm-unlearn sweep``: many trained models, compared by two or more objectives."""

from __future__ import annotations

import importlib.util
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

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
from vlm_unlearn.cli.completion import sweep_keys, sweep_names
from vlm_unlearn.cli.image_folders import reads_images

if TYPE_CHECKING:
    from rich.table import Table

    from vlm_unlearn.sweeps import SweepResult

MAX_PRINTED = 40  # trials in the terminal; the report has all


@reads_images
def sweep(
    sweep_file: Path = typer.Argument(
        ...,
        metavar="SWEEP.yaml",
        help="A sweep, or the name of a shipped one such as sweeps/tiny.",
        autocompletion=sweep_names,
    ),
    overrides: list[str] = typer.Argument(
        None,
        metavar="[key=value ...]",
        help="Dotted overrides, such as trials=40 or overrides.data=data/mine.",
        autocompletion=sweep_keys,
    ),
    out: Path = typer.Option(
        ..., "--out", help="Folder of the sweep. The same command with the same folder joins or resumes it."
    ),
    storage: str = typer.Option(
        None,
        "--storage",
        metavar="URL",
        help="Database of the study, such as postgresql://user@host/db. Default: the file study.journal in --out.",
    ),
    workers: int = typer.Option(1, "--workers", min=1, help="Number of processes that run trials on this machine."),
    gpus_per_trial: int = typer.Option(
        1, "--gpus-per-trial", min=1, help="GPUs of each worker. With several, each training runs as processes."
    ),
    engine: Path = typer.Option(
        None,
        "--engine",
        metavar="FILE",
        help="Config file of accelerate for several GPUs, such as recipes/engines/fsdp2.yaml.",
    ),
    report_only: bool = typer.Option(
        False, "--report-only", help="Write the report and the chosen recipes of the trials until now, and run none."
    ),
    as_json: bool = JSON_OPTION,
) -> None:
    """Trains and measures many settings of a recipe, and finds the Pareto front of the objectives.

    Trials are compared by one half of the questions, and their rates are reported on the other. Run again after an
    interruption, it resumes. Started several times, also on other machines, the commands share the trials.

    Example:

      vlm-unlearn sweep sweeps/tiny --out sweeps/tiny --workers 2

      vlm-unlearn sweep mine.yaml sampler=grid --out sweeps/mine --storage postgresql://user@host/studies
    """
    from vlm_unlearn.config import Sweep, load
    from vlm_unlearn.errors import UserError
    from vlm_unlearn.worker_pool import prepare_processes

    if importlib.util.find_spec("optuna") is None:
        raise UserError(
            "a sweep needs the package optuna. Run pip install 'vlm-unlearn[sweep]'.", code="missing-package"
        )
    config = load(Sweep, sweep_file, overrides or [])
    if workers > 1 and not report_only:
        prepare_processes(["vlm_unlearn.sweeps.worker"])
    with status_console().status("loading transformers"):
        from vlm_unlearn.reporting.sweeps.report import write_sweep_report
        from vlm_unlearn.store import user_path
        from vlm_unlearn.sweeps.runner import finish, prepare, run_sweep

        quiet_libraries()
    with Stages() as stages, redirect_stdout(sys.stderr):  # libraries print, but standard output is for the result
        stages.wait("checking the sweep")
        if report_only:
            folder = user_path(str(out)).absolute()
            result = finish(config, folder, *prepare(config, folder, storage))
        else:
            result = run_sweep(config, out, storage, workers, gpus_per_trial, engine, stages.update)
        report = write_sweep_report(user_path(str(out)).absolute(), config, result)
    if as_json:
        print_json(result.to_json())
        return
    _print_result(result, out, report)


def _print_result(result: SweepResult, out: Path, report: Path) -> None:
    console = result_console()
    console.print(_table(result))
    states = [trial.state for trial in result.trials]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    console.print(f"trials: {counts}; on the front: {len(result.front)}", markup=False, highlight=False)
    for name, number in result.choices.items():
        line = f"{name}: trial {number}, recipe {out / 'choices'}/{name}.yaml"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(f"Report: {report}", markup=False, highlight=False, soft_wrap=True)


def _table(result: SweepResult) -> Table:
    """Returns the trials of the front, or all trials if there are few."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAVY, caption="On the front: *. Rates of the half that is reported, in percent.")
    table.add_column("trial", justify="right")
    table.add_column("settings", overflow="fold")
    for name, direction in result.objectives.items():
        table.add_column(f"{escape_markup(name)} ({direction})", justify="right")
    table.add_column("state")
    front = set(result.front)
    trials = result.trials if len(result.trials) <= MAX_PRINTED else [result.trial(number) for number in result.front]
    for trial in trials:
        settings = ", ".join(f"{key}={_short(value)}" for key, value in trial.params.items())
        values = [trial.reported.get(name) for name in result.objectives]
        state = trial.state if trial.feasible else "outside of the constraints"
        table.add_row(
            f"{trial.number}{'*' if trial.number in front else ''}",
            escape_markup(settings),
            *("–" if value is None else f"{100 * value:.1f}" for value in values),
            state,
        )
    return table


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
