"""Step two of an evaluation (generate, judge, score): grades a run's answers with a suite's judges."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path

from pydantic import ConfigDict, Field

from vlm_unlearn.config import JudgeConfig, Suite
from vlm_unlearn.errors import RunError, UserError, nearest, quoted
from vlm_unlearn.evaluation.core import pair_answers
from vlm_unlearn.evaluation.generate import OnDone, saved_suite
from vlm_unlearn.evaluation.prompts import image_roots
from vlm_unlearn.judging.base import Answer, Judge, build_judge, judge_file
from vlm_unlearn.records import Prompt, Record, Response, Verdict
from vlm_unlearn.store import EvaluationRun, read_records


def suite_judges(suite: Suite) -> dict[str, JudgeConfig]:
    """Returns the judges that a suite's metrics and benchmarks need, by the name that these use for them.

    The name ``""`` stands for the suite's default judge, the key ``judge``. If the default judge is not a language
    model, other judges are left out if they are language models without a `model`. `metrics_without_judge` lists what
    is then not measured.

    Raises:
        UserError: Two different judges would have the same id, and so the same verdict file.
    """
    names = {metric.judge for metric in suite.active_metrics()} | {benchmark.judge for benchmark in suite.benchmarks}
    judges = {"": suite.judge} if suite.splits else {}
    for name in suite.judges:
        judge = suite.judge_config(name)
        has_no_model = judge.name == "llm" and judge.model is None and suite.judge.name != "llm"
        if name in names and not has_no_model:
            judges[name] = judge
    by_id: dict[str, JudgeConfig] = {}
    for name, judge in judges.items():
        if by_id.setdefault(judge.judge_id, judge).fingerprint_fields() != judge.fingerprint_fields():
            raise UserError(
                f"another judge of this suite has the id {judge.judge_id} too, which names the verdict file. "
                "Choose another rubric or model, or grade with this judge separately by `vlm-unlearn judge run`.",
                code="duplicate-id",
                field=f"judges.{name}",
            )
    return judges


def metrics_without_judge(suite: Suite) -> list[str]:
    """Returns the metrics and benchmarks that are not measured because their judge has no language model."""
    judges = suite_judges(suite)
    paper_metrics = suite.paper_metrics if suite.paper_compat else {}
    names = [name for name, metric in suite.metrics.items() if metric.judge not in judges]
    names += [f"{name} (published)" for name, metric in paper_metrics.items() if metric.judge not in judges]
    names += [benchmark.name for benchmark in suite.benchmarks if benchmark.judge and benchmark.judge not in judges]
    return names


def splits_judged_by(suite: Suite, judge: str) -> set[str]:
    """Returns the splits and benchmarks whose answers a judge grades.

    Args:
        suite: The suite.
        judge: The judge's name in the suite. The default judge ``""`` grades all splits, another judge those of its
            metrics and benchmarks.
    """
    if not judge:
        return {split.name for split in suite.splits}
    metric_splits = {split for metric in suite.active_metrics() if metric.judge == judge for split in metric.splits}
    return metric_splits | {benchmark.name for benchmark in suite.benchmarks if benchmark.judge == judge}


def judge_run(
    run: str | PathLike[str],
    config: JudgeConfig,
    on_done: OnDone | None = None,
    splits: Iterable[str] | None = None,
    judge: Judge | None = None,
) -> Path:
    """Grades a run's answers and writes verdicts-<judge id>.jsonl.

    Existing verdicts are kept, and failed ones are tried again. If the judge has changed since, its earlier verdicts
    are moved to before-verdicts-<judge id>.jsonl and all answers are graded again.

    Args:
        run: The run folder, as a path or as an `EvaluationRun`.
        config: The judge.
        on_done: Called with the stage and the number of graded and of all answers.
        splits: The splits and benchmarks to grade. None: all splits.
        judge: The judge of `config`, if it has been built already.

    Returns:
        The file with the verdicts.

    Raises:
        UserError: The folder contains no finished answers or no such split, or another process is using it.
        RunError: The judge's server does not respond.
    """
    judge = build_judge(config) if judge is None else judge
    run = EvaluationRun(run)
    prompts, responses = run.read_answers()
    suite = saved_suite(run)
    roots = image_roots(suite)
    graded_splits = {split.name for split in suite.splits} if splits is None else set(splits)
    if not graded_splits:
        raise UserError(
            f"the run has no splits, and benchmarks are graded on request only. Pass --split with {', '.join(roots)}.",
            code="missing-setting",
            file=run.path,
        )
    for name in graded_splits - set(roots):
        raise UserError(
            f"the run has no split {quoted(name)}{nearest(name, roots) or '.'} Available: {', '.join(roots)}.",
            code="unknown-name",
            file=run.path,
            field="--split",
        )
    graded_responses = [response for response in responses if prompts[response.prompt_id].set in graded_splits]
    answers = _collect_answers(prompts, graded_responses, roots)
    with run.lock():
        verdicts_file = run.open_verdicts(judge.name, judge_identity(judge), config.fingerprint_fields())
        judge_file(
            judge,
            answers,
            verdicts_file,
            None if on_done is None else lambda done: on_done(f"judge {judge.name}", done, len(answers)),
        )
    return verdicts_file


def judge_identity(judge: Judge) -> dict[str, object]:
    """Returns the contents of a judge's identity file without the config."""
    return {**judge.identity(), "labels": list(judge.labels)}


def _collect_answers(
    prompts: Mapping[str, Prompt], responses: Iterable[Response], roots: Mapping[str, Path]
) -> list[Answer]:
    """Returns the responses with their prompts, image folders and the first rewrite of their question."""
    return pair_answers(
        prompts,
        responses,
        lambda prompt, response, first_question: Answer(prompt, response, roots[prompt.set], first_question),
    )


class JudgeCost(Record):
    """The number of a judge's verdicts, and what they cost.

    `vlm-unlearn judge run --json` prints these fields, under their serialization aliases.
    """

    model_config = ConfigDict(serialize_by_alias=True)

    judge: str
    verdicts: int
    failed: int  # verdicts with neither a label nor a score
    unreadable: int = Field(serialization_alias="unread")  # failed because of an unreadable reply; not tried again
    requests: int = Field(serialization_alias="asked")  # requests to a language model; cached replies do not count
    tokens_read: int
    tokens_written: int
    cost: float | None = None  # by the prices in the judge's config, if it has any
    labels: dict[str, int] = Field(default_factory=dict)  # number of verdicts by label
    score: float | None = None  # mean score, for a judge that returns scores
    error: str | None = None  # the most frequent error

    def describe(self) -> str:
        """Returns the cost as text: ``"1,204 verdicts, 3 failed; 310,000 tokens read, 12,000 written"``."""
        text = f"{self.verdicts:,} verdicts, {self.failed:,} failed"
        if self.unreadable:
            text += f" ({self.unreadable:,} unreadable replies)"
        if self.labels:
            counts = (f"{count:,} {label.replace('_', ' ')}" for label, count in self.labels.items())
            text += f" ({', '.join(counts)})"
        if self.score is not None:
            text += f", mean score {self.score:.3f}"
        if self.error:
            text += f"; most frequent error: {quoted(self.error)}"
        if self.tokens_read:
            text += f"; {self.tokens_read:,} tokens read, {self.tokens_written:,} written"
        if self.cost is not None:
            text += f", cost {self.cost:,.2f}"
        return text


def judge_cost(file: Path, config: JudgeConfig) -> JudgeCost:
    """Adds up the verdicts of a file and their cost.

    Args:
        file: The file with the verdicts.
        config: The judge, with its prices per million tokens.
    """
    verdicts = list(read_records(file, Verdict))
    errors = Counter(verdict.error for verdict in verdicts if verdict.error is not None)
    scores = [verdict.score for verdict in verdicts if verdict.score is not None]
    tokens = [verdict.tokens for verdict in verdicts if verdict.tokens is not None]
    tokens_read = sum(read for read, _ in tokens)
    tokens_written = sum(written for _, written in tokens)
    has_prices = config.input_price or config.output_price
    return JudgeCost(
        judge=config.judge_id,
        verdicts=len(verdicts),
        failed=sum(verdict.label is None and verdict.score is None for verdict in verdicts),
        unreadable=sum(verdict.error is not None and verdict.raw is not None for verdict in verdicts),
        requests=len(tokens),
        tokens_read=tokens_read,
        tokens_written=tokens_written,
        cost=(tokens_read * config.input_price + tokens_written * config.output_price) / 1e6 if has_prices else None,
        labels=Counter(verdict.label for verdict in verdicts if verdict.label is not None),
        score=sum(scores) / len(scores) if scores else None,
        error=next((error for error, _ in errors.most_common(1)), None),
    )


def suite_costs(run: EvaluationRun, suite: Suite) -> list[JudgeCost]:
    """Returns the costs of those judges of a suite that have graded the run."""
    files = {run.verdicts_file(config.judge_id): config for config in suite_judges(suite).values()}
    return [judge_cost(file, config) for file, config in files.items() if file.exists()]


def judging_notes(costs: Iterable[JudgeCost], suite: Suite) -> list[str]:
    """Returns sentences for the user about a run's judging: costs, failures, and metrics that were not measured.

    Judges without failures and without a language model are not mentioned.
    """
    notes = []
    for cost in costs:
        if cost.tokens_read or cost.failed:
            retry = ". `vlm-unlearn judge run` tries the failed ones again" if cost.failed > cost.unreadable else ""
            notes.append(f"judge {cost.judge}: {cost.describe()}{retry}")
    if unmeasured := metrics_without_judge(suite):
        notes.append(f"not measured without a language model (pass judge.model=...): {', '.join(unmeasured)}")
    return notes


def validate_any_verdict(costs: Iterable[JudgeCost]) -> None:
    """Raises an error if a judge returned no usable verdict at all.

    Raises:
        RunError: All verdicts of a judge failed.
    """
    for cost in costs:
        if cost.verdicts and cost.failed == cost.verdicts:
            raise RunError(
                f"the judge {cost.judge} returned no usable verdict on any of {cost.verdicts:,} answers. "
                f"Most frequent error: {quoted(cost.error or '')}.",
                code="no-verdicts",
            )
