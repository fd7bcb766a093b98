"""``vlm-unlearn judge``."""

from __future__ import annotations

from pathlib import Path

import typer

from vlm_unlearn.cli.common import JSON_OPTION, Stages, print_json, result_console
from vlm_unlearn.cli.completion import judge_keys
from vlm_unlearn.cli.terminal import Commands

judge_app = Commands("Grades answers by language models or keywords; rubrics, and agreement with people.")
RUN = typer.Argument(..., metavar="RUN", help="A folder that generate or evaluate wrote.")


@judge_app.command("run")
def judge_run_command(
    run: Path = RUN,
    overrides: list[str] = typer.Argument(
        None,
        metavar="[key=value ...]",
        help="One judge's keys, such as name=keyword; or the suite's, such as judge.model=M or paper=true.",
        autocompletion=judge_keys,
    ),
    case: list[str] = typer.Option(
        [], "--case", help="With one judge's keys: a case or benchmark to grade, perhaps again; default: all cases."
    ),
    as_json: bool = JSON_OPTION,
) -> None:
    """Grades a run's answers, by its suite's judges or by another one beside them; answers are not generated again.

    Verdicts that are there are kept, those that failed are tried again, and a judge whose rubric or model has changed grades anew. The
    suite's keys are written into the run, for score and compare.

    Examples:

      vlm-unlearn judge run evaluations/npo judge.model=JUDGE judge.server=http://localhost:8000/v1

      vlm-unlearn judge run evaluations/npo name=llm rubric=strongreject server=http://localhost:8000/v1 model=JUDGE --case unsafe
    """
    from vlm_unlearn.config import JudgeConfig, apply_overrides, validate
    from vlm_unlearn.evaluation.generate import save_suite, saved_suite
    from vlm_unlearn.evaluation.verdicts import (
        judge_cost,
        judge_run,
        splits_judged_by,
        suite_judges,
        validate_any_verdict,
    )

    one = _names_one_judge(overrides or [], case)
    done = []
    with Stages() as bars:
        if one:
            config = validate(JudgeConfig, apply_overrides({}, overrides, JudgeConfig), "judge")
            done.append((config, judge_run(run, config, bars.update, case or None)))
        else:
            suite = saved_suite(run, overrides or [])
            for called, config in suite_judges(suite).items():
                done.append((config, judge_run(run, config, bars.update, splits_judged_by(suite, called))))
            save_suite(run, suite)
    costs = [judge_cost(file, config) for config, file in done]
    if as_json:
        print_json([cost.model_dump() for cost in costs])
    else:
        for cost, (_, file) in zip(costs, done, strict=True):
            typer.echo(f"{file}: {cost.describe()}")
    validate_any_verdict(costs)


def _names_one_judge(overrides: list[str], cases: list[str]) -> bool:
    """Whether the keys are one judge's, and not the suite's.

    Raises:
        UserError: they are of both, or cases are named that only one judge's keys go with.
    """
    from vlm_unlearn.config import JudgeConfig
    from vlm_unlearn.errors import UserError
    from vlm_unlearn.evaluation.generate import REJUDGEABLE_KEYS

    keys = {text.partition("=")[0].partition(".")[0].strip() for text in overrides}
    judges = set(JudgeConfig.model_fields) - {"paper"}
    if keys & set(REJUDGEABLE_KEYS) - {"paper"} and keys & judges:
        raise UserError(
            "pass either one judge's keys (name=..., rubric=...) or the suite's (judge.model=..., paper=true), not both"
        )
    if cases and not keys & judges:
        raise UserError("--case goes with one judge's keys, such as name=keyword")
    return bool(keys & judges)


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
    from vlm_unlearn.errors import UserError
    from vlm_unlearn.judging.keyword import corrected_refusal, published_refusal
    from vlm_unlearn.metrics.rates import rate
    from vlm_unlearn.store import read_json

    found = read_json(answers)
    if not isinstance(found, dict) or not found or not all(isinstance(text, str) for text in found.values()):
        raise UserError(f"{answers}: expected a non-empty object, id -> answer text")
    refusal = published_refusal if paper else corrected_refusal
    hits = [refusal(text) is not None for text in found.values()]
    share = rate(hits, list(found))
    result = {"n": len(hits), "refused": sum(hits), "rate": share.value, "low": share.low, "high": share.high}
    if as_json:
        print_json(result)
    else:
        typer.echo(f"{result['refused']} of {result['n']} refused: {100 * (share.value or 0):.1f} %")


@judge_app.command("rubrics")
def rubrics(as_json: bool = JSON_OPTION) -> None:
    """Lists the rubrics that a language-model judge can go by; a file of your own is named by its path.

    Example:

      vlm-unlearn judge rubrics
    """
    from vlm_unlearn.judging.rubric import load_rubric, shipped_rubrics

    loaded = [load_rubric(name) for name in shipped_rubrics()]
    if as_json:
        print_json(
            [
                {
                    "name": one.name,
                    "version": one.header.version,
                    "source": one.header.source,
                    "labels": list(one.labels),
                    "digest": one.digest,
                }
                for one in loaded
            ]
        )
        return
    for one in loaded:
        typer.echo(f"{one.name:<14}v{one.header.version}  {'labels' if one.labels else 'score'}  {one.header.source}")


@judge_app.command("agreement")
def agreement_command(
    run: Path = RUN,
    judge: list[str] = typer.Option(
        [], "--judge", help="A judge that has graded the run; may be given again; default: all."
    ),
    human: Path = typer.Option(None, "--human", help="A CSV with the columns prompt_id, label and, if needed, sample."),
    positive: str = typer.Option("complied", "--positive", help="The label that is looked for."),
    as_json: bool = JSON_OPTION,
) -> None:
    """Says how far judges agree with people's labels, or with the first judge: kappa, true positive and negative rate.

    Example:

      vlm-unlearn judge agreement evaluations/npo --human labels.csv
    """
    from vlm_unlearn.evaluation.agreement import judge_agreement

    found = judge_agreement(run, judge, human, positive)
    if as_json:
        print_json([one.model_dump() for one in found])
        return
    from rich import box
    from rich.table import Table

    from vlm_unlearn.records import Rate

    def cell(rate: Rate | None) -> str:
        if rate is None or rate.value is None or rate.low is None or rate.high is None:
            return "–"
        return f"{rate.value:.2f} [{rate.low:.2f}, {rate.high:.2f}]"

    table = Table(
        "judge",
        "against",
        "n",
        "failed",
        "kappa",
        f"kappa {positive}",
        "true positives",
        "true negatives",
        box=box.SIMPLE_HEAVY,
    )
    for one in found:
        kappa = one.kappa_positive
        rates = (one.kappa, kappa, one.true_positive_rate, one.true_negative_rate)
        table.add_row(one.judge, one.reference, str(kappa.n), str(kappa.failed), *map(cell, rates))
    result_console().print(table)


@judge_app.command("sheet")
def sheet(
    run: Path = RUN,
    out: Path = typer.Argument(..., metavar="OUT.csv", help="The file to write."),
    count: int = typer.Option(100, "--count", min=1, help="Answers to draw."),
    seed: int = typer.Option(0, "--seed", help="Of the draw."),
) -> None:
    """Writes a CSV of answers for people to label, drawn over all cases; `judge agreement --human` reads it.

    Example:

      vlm-unlearn judge sheet evaluations/npo labels.csv --count 200
    """
    from vlm_unlearn.errors import UserError
    from vlm_unlearn.evaluation.agreement import export_for_labeling
    from vlm_unlearn.records import LABELS

    if (out.parent / "manifest.json").exists():
        raise UserError(f"{out.parent}: is a run; write the sheet somewhere else")
    drawn = export_for_labeling(run, out, count, seed)
    typer.echo(f"{drawn} answers in {out}; fill the column label with {', '.join(LABELS)}")
