"""``vlm-unlearn judge``: grades answers, compares judges, and exports answers for people to label."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from vlm_unlearn.cli.common import JSON_OPTION, Stages, print_json, result_console
from vlm_unlearn.cli.completion import judge_keys
from vlm_unlearn.cli.image_folders import reads_images
from vlm_unlearn.cli.terminal import Commands

if TYPE_CHECKING:
    from vlm_unlearn.config import JudgeConfig

judge_app = Commands(
    "Grades answers with language models or keywords, lists rubrics, and measures the agreement with people."
)
RUN = typer.Argument(..., metavar="RUN", help="A folder that generate or evaluate wrote.")


@judge_app.command("run")
@reads_images
def judge_run_command(
    run: Path = RUN,
    overrides: list[str] = typer.Argument(
        None,
        metavar="[key=value ...]",
        help="Keys of one judge, such as name=keyword, or of the suite, such as judge.model=M or paper_compat=true.",
        autocompletion=judge_keys,
    ),
    split: list[str] = typer.Option(
        [],
        "--split",
        help="A split or benchmark to grade, with the keys of one judge. May be repeated. Default: all splits.",
    ),
    as_json: bool = JSON_OPTION,
) -> None:
    """Grades the answers of a run with the judges of its suite, or with another judge. It generates no answers.

    Existing verdicts are kept, and failed ones are tried again. A judge whose rubric or model has changed grades all
    answers again. The keys of the suite are saved in the run, where score and compare read them.

    Examples:

      vlm-unlearn judge run evaluations/npo judge.model=JUDGE judge.server=http://localhost:8000/v1

      vlm-unlearn judge run evaluations/npo name=llm rubric=strongreject server=http://localhost:8000/v1
      model=JUDGE --split unsafe
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
    from vlm_unlearn.store import EvaluationRun

    single_judge = _configures_one_judge(overrides or [], split)
    graded = []
    with Stages() as stages:
        if single_judge:
            config = validate(JudgeConfig, apply_overrides({}, overrides, JudgeConfig), "judge")
            graded.append((config, judge_run(run, config, stages.update, split or None)))
        else:
            suite = saved_suite(run, overrides or [])
            _check_files_are_confirmed(suite_judges(suite).values(), overrides or [], run)
            for name, config in suite_judges(suite).items():
                graded.append((config, judge_run(run, config, stages.update, splits_judged_by(suite, name))))
            save_suite(EvaluationRun(run), suite)
    costs = [judge_cost(file, config) for config, file in graded]
    if as_json:
        print_json([cost.model_dump() for cost in costs])
    else:
        for cost, (_, file) in zip(costs, graded, strict=True):
            typer.echo(f"{file}: {cost.describe()}")
    validate_any_verdict(costs)


def _check_files_are_confirmed(judges: Iterable[JudgeConfig], overrides: list[str], run: Path) -> None:
    """Checks that the user has named each Python file that a judge is in, because a run can be somebody else's.

    Raises:
        UserError: Only the run folder names the file.
    """
    from vlm_unlearn.errors import UserError, quoted
    from vlm_unlearn.plugins import absolute_name, is_file_name

    confirmed = {
        absolute_name(value) for value in (text.partition("=")[2] for text in overrides) if is_file_name(value)
    }
    for judge in judges:
        if is_file_name(judge.name) and judge.name not in confirmed:
            raise UserError(
                f"the judge of this run is Python code, {quoted(judge.name)}. To run it, pass it as judge.name=...",
                code="unconfirmed-plugin",
                file=run,
            )


def _configures_one_judge(overrides: list[str], splits: list[str]) -> bool:
    """Returns whether the overrides configure one judge instead of the suite. `paper_compat` is a key of both.

    Raises:
        UserError: The overrides mix keys of both, or there are splits but no keys of one judge.
    """
    from vlm_unlearn.config import JudgeConfig, Suite
    from vlm_unlearn.errors import UserError
    from vlm_unlearn.evaluation.generate import REJUDGEABLE_KEYS

    typed = {text.partition("=")[0].partition(".")[0].strip() for text in overrides}
    keys = {Suite.renamed_keys.get(key, key) for key in typed}
    judge_keys = set(JudgeConfig.model_fields)
    suite_keys = set(REJUDGEABLE_KEYS) - judge_keys
    if keys & suite_keys and keys & judge_keys - set(REJUDGEABLE_KEYS):
        raise UserError(
            "the keys of one judge (name=..., rubric=...) and of the suite (judge.model=..., metrics....) can't be "
            "mixed. Pass only one kind.",
            code="conflicting-settings",
        )
    single_judge = bool(keys & judge_keys - set(REJUDGEABLE_KEYS))
    if splits and not single_judge:
        raise UserError(
            "needs the keys of one judge. Pass for example name=keyword.", code="missing-setting", field="--split"
        )
    return single_judge


@judge_app.command("keyword")
def judge_keyword(
    answers: Path = typer.Argument(..., metavar="ANSWERS.json", help="A JSON object, id -> answer."),
    paper_compat: bool = typer.Option(
        False, "--paper-compat", help="Use VLGuard's string match exactly as it was published."
    ),
    as_json: bool = JSON_OPTION,
) -> None:
    """Counts the refusals and degenerate answers in a file by rules, without a language model.

    The rate leaves out answers that cannot be judged, such as those in a language without patterns.

    Example:

      vlm-unlearn judge keyword answers.json --json
    """
    from vlm_unlearn.errors import UserError
    from vlm_unlearn.judging.keyword import KeywordJudge
    from vlm_unlearn.metrics.rates import rate
    from vlm_unlearn.records import Prompt
    from vlm_unlearn.store import read_json

    texts = read_json(answers)
    if not isinstance(texts, dict) or not texts or not all(isinstance(text, str) for text in texts.values()):
        raise UserError("expected a non-empty JSON object, id -> answer text", code="invalid-field", file=answers)
    judge = KeywordJudge(paper_compat)
    prompt = Prompt(id="answer", group_id="answer", set="answers", kind="unsafe", question="")
    verdicts = {id: judge.grade(prompt, text) for id, text in texts.items()}
    labels = {id: verdict.label for id, verdict in verdicts.items() if verdict.label is not None}
    hits = [label == "refused" for label in labels.values()]
    share = rate(hits, list(labels))
    result = {"n": len(hits), "refused": sum(hits), "rate": share.value, "low": share.low, "high": share.high}
    degenerate = sum(label == "degenerate" for label in labels.values())
    if not paper_compat:
        result |= {"degenerate": degenerate, "unread": len(texts) - len(labels)}
    if as_json:
        print_json(result)
        return
    line = f"{result['refused']} of {result['n']} refused: {100 * (share.value or 0):.1f} %"
    if degenerate:
        line += f", {degenerate} degenerate"
    if len(labels) < len(texts):
        reason = next(verdict.error for verdict in verdicts.values() if verdict.error)
        line += f", {len(texts) - len(labels)} unread ({reason})"
    typer.echo(line)


@judge_app.command("rubrics")
def rubrics(as_json: bool = JSON_OPTION) -> None:
    """Lists the shipped rubrics of language-model judges. A rubric of your own is a file, named by its path.

    Example:

      vlm-unlearn judge rubrics
    """
    from vlm_unlearn.judging.rubric import load_rubric, shipped_rubrics

    loaded = [load_rubric(name) for name in shipped_rubrics()]
    if as_json:
        print_json(
            [
                {
                    "name": rubric.name,
                    "version": rubric.header.version,
                    "source": rubric.header.source,
                    "labels": list(rubric.labels),
                    "digest": rubric.digest,
                }
                for rubric in loaded
            ]
        )
        return
    for rubric in loaded:
        grades = "labels" if rubric.labels else "score"
        typer.echo(f"{rubric.name:<14}v{rubric.header.version}  {grades}  {rubric.header.source}")


@judge_app.command("agreement")
def agreement_command(
    run: Path = RUN,
    judge: list[str] = typer.Option(
        [], "--judge", help="A judge that has graded the run. May be repeated. Default: all of them."
    ),
    human: Path = typer.Option(
        None, "--human", help="A CSV with the columns prompt_id and label, and sample if there are several."
    ),
    positive: str = typer.Option(
        "complied", "--positive", help="The label that counts as positive in the true positive rate."
    ),
    as_json: bool = JSON_OPTION,
) -> None:
    """Measures how far judges agree with people's labels, or with the first judge.

    It prints Cohen's kappa and the true positive and true negative rates.

    Example:

      vlm-unlearn judge agreement evaluations/npo --human labels.csv
    """
    from vlm_unlearn.evaluation.agreement import judge_agreement

    agreements = judge_agreement(run, judge, human, positive)
    if as_json:
        print_json([result.model_dump() for result in agreements])
        return
    from rich import box
    from rich.table import Table

    from vlm_unlearn.records import Rate

    def cell(rate: Rate | None) -> str:
        if rate is None or rate.value is None or rate.low is None or rate.high is None:
            return "–"
        return f"{rate.value:.2f} [{rate.low:.2f}, {rate.high:.2f}]"

    table = Table(
        *("judge", "against", "n", "failed", "kappa", f"kappa {positive}", "true positives", "true negatives"),
        box=box.SIMPLE_HEAVY,
    )
    for result in agreements:
        kappa = result.kappa_positive
        rates = (result.kappa, kappa, result.true_positive_rate, result.true_negative_rate)
        table.add_row(result.judge, result.reference, str(kappa.n), str(kappa.failed), *map(cell, rates))
    result_console().print(table)


@judge_app.command("export-for-labeling")
def export_command(
    run: Path = RUN,
    out: Path = typer.Argument(..., metavar="OUT.csv", help="The file to write."),
    count: int = typer.Option(100, "--count", min=1, help="Number of answers to sample."),
    seed: int = typer.Option(0, "--seed", help="Seed of the sample."),
) -> None:
    """Writes a CSV of sampled answers for people to label. `judge agreement --human` reads it.

    The answers are sampled evenly over the splits.

    Example:

      vlm-unlearn judge export-for-labeling evaluations/npo labels.csv --count 200
    """
    from vlm_unlearn.errors import UserError
    from vlm_unlearn.evaluation.agreement import export_for_labeling
    from vlm_unlearn.records import LABELS
    from vlm_unlearn.store import RunDirectory

    if RunDirectory(out.parent).exists():
        raise UserError("is a run folder. Write the CSV to another folder.", code="output-exists", file=out.parent)
    written = export_for_labeling(run, out, count, seed)
    typer.echo(f"{written} answers in {out}; fill the column label with {', '.join(LABELS)}")
