"""The third of three steps: derives the rates from verdicts."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_unlearn.config import MetricConfig, Suite
from vlm_unlearn.errors import UserError
from vlm_unlearn.evaluation.benchmarks import SPECIFICITY, benchmark_rates
from vlm_unlearn.evaluation.generate import read_answers, read_batching
from vlm_unlearn.evaluation.verdicts import splits_judged_by, suite_judges
from vlm_unlearn.judging.rubric import load_rubric
from vlm_unlearn.metrics.rates import Outcomes, count_labels, label_outcomes, score_outcomes
from vlm_unlearn.records import LABELS, Batching, Label, Prompt, Rate, Response, Row, Summary, Verdict
from vlm_unlearn.store import read_json, read_records, write_json


@dataclass(frozen=True)
class JudgeVerdicts:
    """What one judge gave."""

    judge: str
    identity: Mapping[str, Any]  # what decided its verdicts
    labels: Collection[Label]  # those that it can tell
    verdicts: Sequence[Verdict]


@dataclass(frozen=True)
class GradedRun:
    """A run's prompts by id, and its verdicts by the name that the suite's metrics call their judge."""

    suite: Suite
    prompts: Mapping[str, Prompt]
    responses: Sequence[Response]
    graded: Mapping[str, JudgeVerdicts]
    batching: Batching | None = None

    def measured(self, metrics: Mapping[str, MetricConfig]) -> dict[str, MetricConfig]:
        """Those whose judge has graded the run."""
        return {name: metric for name, metric in metrics.items() if metric.judge in self.graded}

    def judged(self) -> dict[str, float | None]:
        """A judge's score by prompt id, of the benchmarks that a judge scores."""
        judges = {benchmark.judge for benchmark in self.suite.benchmarks if benchmark.judge in self.graded}
        return {verdict.prompt_id: verdict.score for judge in judges for verdict in self.graded[judge].verdicts}


def score_run(folder: Path, suite: Suite, name: str) -> Row:
    """Derives the rates from a run's verdicts; writes summary.json with one row and returns the row.

    Raises:
        UserError: the verdicts are not those of this run's answers.
    """
    row = build_row(read_graded_run(folder, suite), name)
    write_json(folder / "summary.json", Summary(rows=[row]).model_dump())
    return row


def read_graded_run(folder: Path, suite: Suite) -> GradedRun:
    """A run with the verdicts that a suite's metrics need.

    Raises:
        UserError: there are none, or they are not those of this run's answers.
    """
    prompts, responses = read_answers(folder)
    graded: dict[str, JudgeVerdicts] = {}
    for called, config in suite_judges(suite).items():
        cases = splits_judged_by(suite, called)
        keys = {response.key for response in responses if prompts[response.prompt_id].set in cases}
        verdicts = _read_verdicts(folder / f"verdicts-{config.judge_id}.jsonl", config.judge_id, keys)
        note = folder / f"judge-{config.judge_id}.json"
        identity = read_json(note)
        told = identity.get("labels") if isinstance(identity, dict) else None
        if not isinstance(told, list) or any(label not in LABELS for label in told):
            raise UserError(
                f"{note}: does not say what the judge can tell; run `vlm-unlearn judge run` with this judge again"
            )
        if identity.pop("config", None) != config.fingerprint_fields():
            raise UserError(
                f"{note}: its verdicts were made with other settings; run `vlm-unlearn judge run` with this judge again"
            )
        if config.rubric is not None and load_rubric(config.rubric).digest != identity.get("rubric"):
            raise UserError(f"{note}: its rubric has changed since; run `vlm-unlearn judge run` with this judge again")
        graded[called] = JudgeVerdicts(config.judge_id, identity, told, verdicts)
    return GradedRun(suite, prompts, responses, graded, read_batching(folder))


def build_row(run: GradedRun, name: str) -> Row:
    """A run's line in a summary, under a model's name.

    A metric that counts a label which its judge never gives (degenerate answers, for the published keyword list) has no value.
    """

    def rates(metrics: Mapping[str, MetricConfig]) -> dict[str, Rate]:
        return {metric: _rate(run, config, run.graded[config.judge].verdicts) for metric, config in metrics.items()}

    own = run.graded.get("")
    metrics = run.measured(run.suite.metrics)
    published = run.measured(run.suite.paper_metrics) if run.suite.paper_compat else {}
    benchmarks = benchmark_rates(run.suite, run.prompts, run.responses, run.judged())
    shots = {metric: _by_shots(run, config) for metric, config in metrics.items()}
    categories = {metric: _by_category(run, config) for metric, config in metrics.items()}
    return Row(
        model=name,
        judge=own.judge if own else "",
        metrics=rates(metrics) | benchmarks,
        paper=rates(published),
        judges=_own_judges(run, metrics) | _benchmarks_judges(run, benchmarks),
        paper_judges=_own_judges(run, published),
        labels={
            case: count_labels(of_case)
            for case, of_case in _by_case(run.prompts, own.verdicts if own and own.labels else []).items()
        },
        categories={metric: found for metric, found in categories.items() if found},
        rewrites={metric: found for metric, found in shots.items() if found},
        failed=_failed(run, benchmarks),
        batching=run.batching,
    )


def _own_judges(run: GradedRun, metrics: Mapping[str, MetricConfig]) -> dict[str, str]:
    return {name: run.graded[metric.judge].judge for name, metric in metrics.items() if metric.judge}


def _benchmarks_judges(run: GradedRun, rates: Collection[str]) -> dict[str, str]:
    """Each benchmark's judge, empty where its official answers decide; the mean of several has the judge that one of them has."""
    judges = {
        one.name: run.graded[one.judge].judge if one.judge in run.graded else ""
        for one in run.suite.benchmarks
        if one.judge
    }
    of_mean = next((judges[name] for name in SPECIFICITY if judges.get(name)), "")
    return {name: judges.get(name, "") for name in rates} | ({"specificity": of_mean} if "specificity" in rates else {})


def _failed(run: GradedRun, benchmarks: Mapping[str, Rate]) -> dict[str, dict[str, int]]:
    """Answers and verdicts that failed, by judge and case: once each, however many metrics leave them out."""
    found: dict[str, dict[str, int]] = {}
    for graded in run.graded.values():
        for case, of_case in _by_case(run.prompts, graded.verdicts).items():
            failed = sum(verdict.label is None and verdict.score is None for verdict in of_case)
            found.setdefault(graded.judge, {})[case] = failed
    unjudged = {one.name: benchmarks[one.name].failed for one in run.suite.benchmarks if not one.judge}
    return found | ({"": unjudged} if unjudged else {})


def metric_rate(
    prompts: Mapping[str, Prompt], graded: Iterable[Verdict], metric: MetricConfig, told: Collection[Label]
) -> Rate:
    """One metric's rate; arguments as in `metric_outcomes`."""
    return metric_outcomes(prompts, graded, metric, told).rate()


def metric_outcomes(
    prompts: Mapping[str, Prompt], graded: Iterable[Verdict], metric: MetricConfig, told: Collection[Label]
) -> Outcomes:
    """How each answer or question counts in one metric, out of one judge's verdicts; nothing where a label is one it never gives.

    Args:
        told: the labels that the judge can tell.
    """
    of_metric = [verdict for verdict in graded if prompts[verdict.prompt_id].set in metric.splits]
    if metric.score is not None:
        return score_outcomes(prompts, of_metric, metric.score == "one_minus_mean", metric.on_error)
    if not set(metric.labels) <= set(told):
        return Outcomes({}, {})
    return label_outcomes(prompts, of_metric, metric.labels, metric.aggregate, metric.on_error)


def _rate(run: GradedRun, metric: MetricConfig, verdicts: Iterable[Verdict]) -> Rate:
    return metric_rate(run.prompts, verdicts, metric, run.graded[metric.judge].labels)


def _by_shots(run: GradedRun, metric: MetricConfig) -> list[Rate]:
    """The rate with the first 1, 2, ... K shots of those asked; none unless every case of the metric has several."""
    asked: dict[str, set[int]] = {case: set() for case in metric.splits}
    for prompt in run.prompts.values():
        if prompt.set in asked:
            asked[prompt.set].add(prompt.rewrite)
    if min(map(len, asked.values()), default=0) < 2:
        return []
    verdicts = run.graded[metric.judge].verdicts
    shots = sorted(set().union(*asked.values()))  # a number that no prompt has is no shot
    first = ([verdict for verdict in verdicts if run.prompts[verdict.prompt_id].rewrite <= last] for last in shots)
    return [_rate(run, metric, of_first) for of_first in first]


def _by_category(run: GradedRun, metric: MetricConfig) -> dict[str, Rate]:
    """The rate of each category of question; none where the prompts have no categories."""
    found: dict[str, list[Verdict]] = {}
    for verdict in run.graded[metric.judge].verdicts:
        prompt = run.prompts[verdict.prompt_id]
        if prompt.category is not None and prompt.set in metric.splits:
            found.setdefault(prompt.category, []).append(verdict)
    return {category: _rate(run, metric, found[category]) for category in sorted(found)}


def _read_verdicts(file: Path, judge: str, keys: Collection[tuple[str, int]]) -> list[Verdict]:
    """The verdicts on the answers of `keys`, each once.

    Raises:
        UserError: some are missing, or some are there twice or of another judge.
    """
    if not file.exists():
        raise UserError(f"{file}: is not there; run `vlm-unlearn judge run` with this judge first")
    graded = [verdict for verdict in read_records(file, Verdict) if verdict.key in keys]
    missing = len(set(keys) - {verdict.key for verdict in graded})
    if missing or len(graded) != len(keys) or any(verdict.judge != judge for verdict in graded):
        raise UserError(
            f"{file}: does not grade each of this run's answers once ({missing} missing); run `vlm-unlearn judge run` again"
        )
    return graded


def _by_case(prompts: Mapping[str, Prompt], graded: Sequence[Verdict]) -> dict[str, list[Verdict]]:
    by_case: dict[str, list[Verdict]] = {}
    for verdict in graded:
        by_case.setdefault(prompts[verdict.prompt_id].set, []).append(verdict)
    return by_case
