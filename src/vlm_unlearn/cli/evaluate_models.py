"""``vlm-unlearn evaluate`` with several models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import typer

from vlm_unlearn.cli.common import Stages, quiet_libraries, status_console
from vlm_unlearn.cli.report import report_runs
from vlm_unlearn.distributed import world_size
from vlm_unlearn.errors import UserError, printable


def named_models(overrides: Sequence[str]) -> dict[str, str] | None:
    """Returns the models that the override of ``model`` names, by name. None if it names a single model.

    Raises:
        UserError: As `find_models`.
    """
    texts = [text for text in overrides if text.partition("=")[0].strip() == "model"]
    if not texts or not any(char in texts[-1] for char in "[*?"):
        return None
    from vlm_unlearn.config import apply_overrides
    from vlm_unlearn.evaluation.many_models import find_models

    return find_models(apply_overrides({}, texts)["model"])


def evaluate_several(
    suite_file: Path,
    overrides: Sequence[str],
    models: Mapping[str, str],
    out: Path,
    name: str,
    verify_batching: int,
    processes: int | None,
    as_json: bool,
) -> None:
    """Evaluates several models, and writes one report that compares each with the first.

    Raises:
        UserError: As `evaluate_models`. The command was started as several processes, or has a name for one model.
    """
    from vlm_unlearn.config import Suite, load

    if name:
        raise UserError("several models have the names of their folders.", code="conflicting-settings", field="--name")
    if world_size() > 1:
        raise UserError(
            "several models start one process per GPU by themselves. Leave accelerate launch out.",
            code="conflicting-settings",
            field="model",
        )
    suite = load(Suite, suite_file, overrides, {"model": next(iter(models.values()))})
    with status_console().status("loading transformers"):
        from vlm_unlearn.evaluation.generate import generation_notes
        from vlm_unlearn.evaluation.many_models import evaluate_models
        from vlm_unlearn.evaluation.verdicts import judging_notes, suite_costs, validate_any_verdict
        from vlm_unlearn.store import EvaluationRun

        quiet_libraries()
    with Stages() as stages:
        stages.wait("loading the models")
        evaluated = evaluate_models(suite, models, out, stages.update, verify_batching, processes)
    costs = {model: suite_costs(EvaluationRun(run), suite) for model, run in evaluated.runs.items()}
    for model, run in evaluated.runs.items():
        for note in [*generation_notes(run), *judging_notes(costs[model], suite)]:
            typer.echo(printable(f"{model}: {note}"), err=True)
    for model, error in evaluated.errors.items():
        typer.echo(printable(f"{model}: {error}"), err=True)
    if evaluated.runs:
        report_runs(out, dict(evaluated.runs), "", [], as_json)
    if evaluated.errors:
        raise typer.Exit(2 if all(isinstance(error, UserError) for error in evaluated.errors.values()) else 1)
    for model_costs in costs.values():
        validate_any_verdict(model_costs)
