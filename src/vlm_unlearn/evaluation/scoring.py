"""The third of three steps: derives the rates from verdicts."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from vlm_unlearn.config import MetricConfig, Suite
from vlm_unlearn.errors import RequestError
from vlm_unlearn.evaluation.generating import batching_of, read_answers
from vlm_unlearn.evaluation.grading import build_judge, cases_of, suite_judges
from vlm_unlearn.metrics.rates import count_labels, label_rate, rate, score_rate
from vlm_unlearn.records import Label, Prompt, Rate, Row, Summary, Verdict
from vlm_unlearn.store import read_json, read_records, write_json


def score_run(folder: Path, suite: Suite, name: str) -> Row:
    """Derives the rates from a run's verdicts; writes summary.json with one row and returns the row.

    A metric that counts a label which its judge never gives (degenerate answers, for the published keyword list) has no value.

    Raises:
        RequestError: the verdicts are not those of this run's answers.
    """
    prompts, responses = read_answers(folder)
    verdicts: dict[str, list[Verdict]] = {}
    told: dict[str, Collection[Label]] = {}
    names: dict[str, str] = {}
    for called, config in suite_judges(suite).items():
        judge = names[called] = build_judge(config).name
        cases = cases_of(suite, called)
        keys = {response.key for response in responses if prompts[response.prompt_id].set in cases}
        verdicts[called] = _read_verdicts(folder / f"verdicts-{judge}.jsonl", judge, keys)
        told[called] = read_json(folder / f"judge-{judge}.json")["labels"]

    def rates(metrics: Mapping[str, MetricConfig]) -> dict[str, Rate]:
        known = {metric: config for metric, config in metrics.items() if config.judge in verdicts}
        return {metric: metric_rate(prompts, verdicts[config.judge], config, told[config.judge]) for metric, config in known.items()}

    row = Row(
        model=name,
        judge=names[""],
        metrics=rates(suite.metrics),
        paper=rates(suite.paper_metrics) if suite.paper else {},
        labels={case: count_labels(of_case) for case, of_case in _by_case(prompts, verdicts[""]).items()},
        batching=batching_of(folder),
    )
    write_json(folder / "summary.json", Summary(rows=[row]).model_dump())
    return row


def _read_verdicts(file: Path, judge: str, keys: Collection[tuple[str, int]]) -> list[Verdict]:
    """The verdicts on the answers of `keys`, each once.

    Raises:
        RequestError: some are missing, or some are there twice or of another judge.
    """
    if not file.exists():
        raise RequestError(f"{file}: is not there; run `vlm-unlearn judge run` with this judge first")
    graded = [verdict for verdict in read_records(file, Verdict) if verdict.key in keys]
    missing = len(set(keys) - {verdict.key for verdict in graded})
    if missing or len(graded) != len(keys) or any(verdict.judge != judge for verdict in graded):
        raise RequestError(f"{file}: does not grade each of this run's answers once ({missing} missing); run `vlm-unlearn judge run` again")
    return graded


def metric_rate(prompts: Mapping[str, Prompt], graded: Sequence[Verdict], metric: MetricConfig, told: Collection[Label]) -> Rate:
    """One metric's rate, out of one judge's verdicts; one that counts a label which the judge never gives has no value.

    Args:
        told: the labels that the judge can tell.
    """
    of_metric = [verdict for verdict in graded if prompts[verdict.prompt_id].set in metric.cases]
    if metric.score is not None:
        return score_rate(prompts, of_metric, metric.score == "one_minus_mean", metric.failures)
    if not set(metric.labels) <= set(told):
        return rate([], [])
    return label_rate(prompts, of_metric, metric.labels, metric.group, metric.failures)


def _by_case(prompts: Mapping[str, Prompt], graded: Sequence[Verdict]) -> dict[str, list[Verdict]]:
    by_case: dict[str, list[Verdict]] = {}
    for verdict in graded:
        by_case.setdefault(prompts[verdict.prompt_id].set, []).append(verdict)
    return by_case
