"""``vlm-unlearn evaluate``, ``generate`` and ``score``: measure a model with a suite."""

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
    quiet_libraries,
    result_console,
    status_console,
)
from vlm_unlearn.cli.completion import suite_keys, suite_names
from vlm_unlearn.cli.image_folders import reads_images
from vlm_unlearn.distributed import is_main_process

if TYPE_CHECKING:
    from vlm_unlearn.config import Suite
    from vlm_unlearn.records import Row

SUITE = typer.Argument(
    ...,
    metavar="SUITE.yaml",
    help="A suite, or the name of a shipped one such as suites/safety_mirage.",
    autocompletion=suite_names,
)
OVERRIDES = typer.Argument(
    None, metavar="[key=value ...]", help="Dotted overrides. model=... is required.", autocompletion=suite_keys
)
MODELS = typer.Argument(
    None,
    metavar="[key=value ...]",
    help="Dotted overrides. model=... is required. model=[BASE,RUN] and model='runs/*' evaluate several models.",
    autocompletion=suite_keys,
)
RUN = typer.Argument(..., metavar="RUN", help="A folder that generate or evaluate wrote.")
OUT = typer.Option(..., "--out", help="The run folder.")
VERIFY = typer.Option(
    0,
    "--verify-batching",
    min=0,
    metavar="N",
    help="Generate N answers, spread over the suite, again in batches of one, and count those that differ.",
)
NAME = typer.Option("", "--name", help="Name of the model in tables. Default: the name of the run folder.")


@reads_images
def evaluate(
    suite_file: Path = SUITE,
    overrides: list[str] = MODELS,
    out: Path = OUT,
    name: str = NAME,
    verify_batching: int = VERIFY,
    processes: int = typer.Option(
        None,
        "--processes",
        min=1,
        help="Several models: how many generate at the same time. Default: the number of GPUs, or 1 without one.",
    ),
    as_json: bool = JSON_OPTION,
) -> None:
    """Generates, judges and scores a suite, and writes report.html. Run again after an interruption, it resumes.

    Several models share the judges. Each is compared with the first, and --out gets evaluations/NAME and one report.

    One model on several GPUs: accelerate launch -m vlm_unlearn.cli.main evaluate ...

    Examples:

      vlm-unlearn evaluate suites/safety_mirage model=runs/npo root=VLGuard --out evaluations/npo

      vlm-unlearn evaluate suites/safety_mirage model=[BASE,runs/npo,runs/rmu] root=VLGuard --out comparison
    """
    from vlm_unlearn.cli.evaluate_models import evaluate_several, named_models
    from vlm_unlearn.config import Suite, load

    models = named_models(overrides or [])
    if models is not None:
        evaluate_several(suite_file, overrides, models, out, name, verify_batching, processes, as_json)
        return
    suite = load(Suite, suite_file, overrides or [])
    if not is_main_process():
        generate_worker_share(suite, out)
        return
    with status_console().status("loading transformers"):
        from vlm_unlearn.evaluation.generate import generation_notes
        from vlm_unlearn.evaluation.runner import evaluate_run
        from vlm_unlearn.evaluation.verdicts import judging_notes, suite_costs, validate_any_verdict
        from vlm_unlearn.records import Summary
        from vlm_unlearn.reporting.report import write_report
        from vlm_unlearn.store import EvaluationRun

        quiet_libraries()
    with Stages() as stages:
        stages.wait("loading the model")
        row = evaluate_run(suite, out, name or out.resolve().name, stages.update, verify_batching)
    costs = suite_costs(EvaluationRun(out), suite)
    for note in [*generation_notes(out), *judging_notes(costs, suite)]:
        typer.echo(note, err=True)
    with Stages() as stages:
        title = f"vlm-unlearn: {row.model}"
        report = write_report(out, Summary(rows=[row]), {row.model: out}, title, on_done=stages.update)
    _print_row(row, out, as_json, f"Report: {report}")
    validate_any_verdict(costs)


@reads_images
def generate(
    suite_file: Path = SUITE, overrides: list[str] = OVERRIDES, out: Path = OUT, verify_batching: int = VERIFY
) -> None:
    """Generates the model's answers to all prompts of a suite, and writes them to responses.jsonl.

    Example:

      vlm-unlearn generate suites/safety_mirage model=runs/npo root=VLGuard --out evaluations/npo
    """
    from vlm_unlearn.config import Suite, load

    suite = load(Suite, suite_file, overrides or [])
    if not is_main_process():
        generate_worker_share(suite, out)
        return
    with status_console().status("loading transformers"):
        from vlm_unlearn.evaluation.generate import generate_run, generation_notes
        from vlm_unlearn.store import EvaluationRun

        quiet_libraries()
    with Stages() as stages:
        stages.wait("loading the model")
        generate_run(suite, out, stages.update, verify_batching)
    for note in generation_notes(out):
        typer.echo(note, err=True)
    typer.echo(f"answers in {EvaluationRun(out).responses_file}")


def generate_worker_share(suite: Suite, out: Path) -> None:
    """Generates this process's share of the answers. Every process of a distributed run but the first calls it."""
    from vlm_unlearn.evaluation.generate import generate_run

    quiet_libraries()
    generate_run(suite, out)


def score(
    run: Path = RUN,
    overrides: list[str] = typer.Argument(
        None,
        metavar="[key=value ...]",
        help="Keys of the suite, such as judge=keyword or paper_compat=true. They are saved in the run.",
        autocompletion=suite_keys,
    ),
    name: str = NAME,
    as_json: bool = JSON_OPTION,
) -> None:
    """Computes the rates of a run from its verdicts, and writes summary.json.

    Example:

      vlm-unlearn score evaluations/npo judge=keyword --json
    """
    from vlm_unlearn.evaluation.generate import save_suite, saved_suite
    from vlm_unlearn.evaluation.scoring import score_run
    from vlm_unlearn.store import EvaluationRun

    suite = saved_suite(run, overrides or [])
    row = score_run(run, suite, name or run.resolve().name)
    save_suite(EvaluationRun(run), suite)
    _print_row(row, run, as_json, "")


def _print_row(row: Row, run: Path, as_json: bool, note: str) -> None:
    """Prints the rates and the assessment of a model, then a note."""
    from vlm_unlearn.errors import printable
    from vlm_unlearn.records import Summary

    summary = Summary(rows=[row])
    if as_json:
        print_json(summary.model_dump())
        return
    console = result_console()
    console.print(RatesTable(summary))
    print_assessments(console, [row])
    if note:
        console.print(printable(note), markup=False, highlight=False, soft_wrap=True)
