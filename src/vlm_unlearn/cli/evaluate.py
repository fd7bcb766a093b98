"""``vlm-unlearn evaluate`` and its three parts: ``generate``, ``judge``, ``score``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from vlm_unlearn.cli.common import JSON_OPTION, Stages, print_json, quiet_libraries, rates_table, status_console

if TYPE_CHECKING:
    from vlm_unlearn.records import Row

judge_app = typer.Typer(help="Grades answers.", no_args_is_help=True, rich_markup_mode=None)
SUITE = typer.Argument(..., metavar="SUITE.yaml", help="A suite, or the name of a shipped one such as suites/safety_mirage.")
OVERRIDES = typer.Argument(None, metavar="[key=value ...]", help="Dotted overrides; model=... is needed.")
RUN = typer.Argument(..., metavar="RUN", help="A folder that generate or evaluate wrote.")
OUT = typer.Option(..., "--out", help="The run folder.")
NAME = typer.Option("", "--name", help="The row's name; default: the folder's.")


def evaluate(
    suite_file: Path = SUITE, overrides: list[str] = OVERRIDES, out: Path = OUT, name: str = NAME, as_json: bool = JSON_OPTION
) -> None:
    """Generates, judges and scores in one go, and writes report.html. Run again after an interruption it goes on.

    Example:

      vlm-unlearn evaluate suites/safety_mirage model=runs/npo root=VLGuard --out evaluations/npo
    """
    from vlm_unlearn.config import Suite, load

    suite = load(Suite, suite_file, overrides or [])
    with status_console().status("loading transformers"):
        from vlm_unlearn.evaluation.runner import evaluate_run
        from vlm_unlearn.records import Summary
        from vlm_unlearn.reporting.html import write_report

        quiet_libraries()
    with Stages() as bars:
        row = evaluate_run(suite, out, name or out.resolve().name, bars.update)
    write_report(out / "report.html", Summary(rows=[row]), {row.model: out}, f"vlm-unlearn: {row.model}")
    _show(row, as_json, f"Report: {out / 'report.html'}")


def generate(suite_file: Path = SUITE, overrides: list[str] = OVERRIDES, out: Path = OUT) -> None:
    """Asks the model every prompt of a suite; answers go to responses.jsonl.

    Example:

      vlm-unlearn generate suites/safety_mirage model=runs/npo root=VLGuard --out evaluations/npo
    """
    from vlm_unlearn.config import Suite, load

    suite = load(Suite, suite_file, overrides or [])
    with status_console().status("loading transformers"):
        from vlm_unlearn.evaluation.generating import generate_run

        quiet_libraries()
    with Stages() as bars:
        generate_run(suite, out, bars.update)
    typer.echo(f"answers in {out / 'responses.jsonl'}")


@judge_app.command("run")
def judge_run_command(
    run: Path = RUN, overrides: list[str] = typer.Argument(None, metavar="[key=value ...]", help="Judge keys, such as name=keyword.")
) -> None:
    """Grades a run's answers, by its suite's judge or another; answers are not generated again.

    Example:

      vlm-unlearn judge run evaluations/npo name=keyword paper=true
    """
    from vlm_unlearn.config import JudgeConfig, override, validate
    from vlm_unlearn.evaluation.generating import saved_suite
    from vlm_unlearn.evaluation.grading import judge_run

    chosen = override(saved_suite(run).judge.model_dump(), overrides or [])
    with Stages() as bars:
        file = judge_run(run, validate(JudgeConfig, chosen, "judge"), bars.update)
    typer.echo(f"verdicts in {file}")


@judge_app.command("keyword")
def judge_keyword(
    answers: Path = typer.Argument(..., metavar="ANSWERS.json", help="A JSON object, id -> answer."),
    paper: bool = typer.Option(False, "--paper", help="VLGuard's string match exactly as published."),
    as_json: bool = JSON_OPTION,
) -> None:
    """Counts refusals in a file of answers by keywords.

    Example:

      vlm-unlearn judge keyword answers.json --json
    """
    from vlm_unlearn.errors import RequestError
    from vlm_unlearn.judging.keyword import corrected_refusal, published_refusal
    from vlm_unlearn.metrics.rates import rate
    from vlm_unlearn.store import read_json

    found = read_json(answers)
    if not isinstance(found, dict) or not found or not all(isinstance(text, str) for text in found.values()):
        raise RequestError(f"{answers}: expected a non-empty object, id -> answer text")
    refusal = published_refusal if paper else corrected_refusal
    hits = [refusal(text) is not None for text in found.values()]
    share = rate(hits, list(found))
    result = {"n": len(hits), "refused": sum(hits), "rate": share.value, "low": share.low, "high": share.high}
    if as_json:
        print_json(result)
    else:
        typer.echo(f"{result['refused']} of {result['n']} refused: {100 * (share.value or 0):.1f} %")


def score(
    run: Path = RUN,
    overrides: list[str] = typer.Argument(None, metavar="[key=value ...]", help="Suite keys, such as judge=keyword or paper=true."),
    name: str = NAME,
    as_json: bool = JSON_OPTION,
) -> None:
    """Derives the rates from a run's verdicts; writes summary.json.

    Example:

      vlm-unlearn score evaluations/npo judge=keyword --json
    """
    from vlm_unlearn.config import Suite, override, validate
    from vlm_unlearn.evaluation.generating import saved_suite
    from vlm_unlearn.evaluation.scoring import score_run

    suite = validate(Suite, override(saved_suite(run).model_dump(), overrides or []), "score")
    _show(score_run(run, suite, name or run.resolve().name), as_json, "")


def _show(row: Row, as_json: bool, note: str) -> None:
    from rich.console import Console

    from vlm_unlearn.records import Summary

    summary = Summary(rows=[row])
    if as_json:
        print_json(summary.model_dump())
        return
    console = Console()
    console.print(rates_table(summary))
    if note:
        console.print(note, markup=False, highlight=False)
