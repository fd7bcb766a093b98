"""Step three of an evaluation (generate, judge, score): computes the rates from the verdicts of a run's judges.

`score_run` is the entry point. It reads a run folder into a `GradedRun` and computes one `Row` of ``summary.json``.
A suite refers to its judges by name. For a metric, the name ``""`` stands for the suite's default judge, the key
``judge``. For a benchmark, the name ``""`` means that no judge scores it: its official answers do.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

from vlm_unlearn.config import BenchmarkConfig, JudgeConfig, MetricConfig, Suite
from vlm_unlearn.errors import UserError
from vlm_unlearn.evaluation.assessment import assess
from vlm_unlearn.evaluation.benchmarks import SPECIFICITY_BENCHMARKS, benchmark_rates
from vlm_unlearn.evaluation.generate import read_batching
from vlm_unlearn.evaluation.verdicts import splits_judged_by, suite_judges
from vlm_unlearn.judging.rubric import load_rubric
from vlm_unlearn.metrics.rates import Outcomes, count_labels, label_outcomes, score_outcomes
from vlm_unlearn.records import LABELS, Batching, Label, Prompt, Rate, Response, Row, Summary, Verdict
from vlm_unlearn.store import EvaluationRun, read_json

DEFAULT_JUDGE = ""  # the name under which metrics refer to the suite's key `judge`
OFFICIAL_ANSWERS = ""  # stands in the place of a judge for a benchmark that is scored against its official answers


@dataclass(frozen=True)
class JudgeVerdicts:
    """The verdicts of one judge on the answers of one run.

    Attributes:
        judge_id: The judge's name in file names and tables, such as ``keyword``.
        identity: The contents of ``judge-<judge_id>.json`` without the config: everything that determines the verdicts,
            such as the digests of the judge's code and rubric. The config is left out so that two runs graded by equal
            judges compare equal, such as with the same rubric file in two folders.
        available_labels: The labels that the judge can return. Empty for a judge that returns scores only.
        verdicts: One verdict per answer that the judge grades.
    """

    judge_id: str
    identity: Mapping[str, Any]
    available_labels: Collection[Label]
    verdicts: Sequence[Verdict]


@dataclass(frozen=True)
class GradedRun:
    """A finished run with the verdicts of its judges.

    Attributes:
        suite: The suite that was evaluated.
        prompts: Prompts by id.
        responses: The model's answers.
        verdicts_by_judge: Verdicts by the name that the suite's metrics and benchmarks use for the judge. The default
            judge's name is `DEFAULT_JUDGE`.
        batching: The result of the batching check, if it was run.
    """

    suite: Suite
    prompts: Mapping[str, Prompt]
    responses: Sequence[Response]
    verdicts_by_judge: Mapping[str, JudgeVerdicts]
    batching: Batching | None = None

    def judged_metrics(self, metrics: Mapping[str, MetricConfig]) -> dict[str, MetricConfig]:
        """Returns the metrics that can be computed.

        Left out are the metrics whose judge `suite_judges` leaves out: a language model without a `model`, if the
        suite's default judge is not a language model.
        """
        return {name: metric for name, metric in metrics.items() if metric.judge in self.verdicts_by_judge}

    def benchmark_judge(self, benchmark: BenchmarkConfig) -> JudgeVerdicts | None:
        """Returns the verdicts on a benchmark that a judge scores (MM-Vet, LLaVA-Bench).

        None if the benchmark is scored against its official answers, or if `suite_judges` leaves its judge out.
        """
        return None if benchmark.judge == OFFICIAL_ANSWERS else self.verdicts_by_judge.get(benchmark.judge)

    def benchmark_verdicts(self) -> dict[str, Verdict]:
        """Returns the verdicts of the judges that score a benchmark (MM-Vet, LLaVA-Bench), by prompt id."""
        judges = [self.benchmark_judge(benchmark) for benchmark in self.suite.benchmarks]
        return {verdict.prompt_id: verdict for judge in judges if judge is not None for verdict in judge.verdicts}


def score_run(run: str | PathLike[str], suite: Suite, name: str) -> Row:
    """Computes the rates of a graded run, writes them to ``summary.json`` and returns them.

    Args:
        run: The folder of a run with answers and verdicts, as a path or as an `EvaluationRun`.
        suite: The suite whose metrics and benchmarks are computed.
        name: The model's name in the summary.

    Raises:
        UserError: As `read_graded_run`. A benchmark's official files are broken or have changed since the answers were
            generated.
    """
    run = EvaluationRun(run)
    row = build_row(read_graded_run(run, suite), name)
    run.write_summary(Summary(rows=[row]))
    return row


def read_graded_run(run: str | PathLike[str], suite: Suite) -> GradedRun:
    """Reads a run folder with the verdicts of every judge that the suite's metrics and benchmarks need.

    Raises:
        UserError: The run is unfinished, verdicts are missing, duplicate or by another judge, or a judge's settings or
            rubric have changed since it graded.
    """
    run = EvaluationRun(run)
    prompts, responses = run.read_answers()
    verdicts_by_judge: dict[str, JudgeVerdicts] = {}
    for judge_name, config in suite_judges(suite).items():
        splits = splits_judged_by(suite, judge_name)
        # `Prompt.set` is the name of a split or of a benchmark.
        keys = {response.key for response in responses if prompts[response.prompt_id].set in splits}
        verdicts_by_judge[judge_name] = _read_judge_verdicts(run, config, keys)
    return GradedRun(suite, prompts, responses, verdicts_by_judge, read_batching(run))


def _read_judge_verdicts(run: EvaluationRun, config: JudgeConfig, keys: Collection[tuple[str, int]]) -> JudgeVerdicts:
    """Reads one judge's verdicts and checks that they are valid for the run and for the judge's settings.

    Args:
        run: The run.
        config: The judge.
        keys: ``(prompt id, sample)`` of the answers that the judge has to grade.

    Raises:
        UserError: The file does not grade each answer exactly once, or the judge's settings or rubric have changed.
    """
    judge_id = config.judge_id
    file = run.verdicts_file(judge_id)
    rejudge = f"Run `vlm-unlearn judge run {shlex.quote(str(run.path))}` with this judge"
    if not file.exists():
        raise UserError(f"no such file. {rejudge} first.", code="no-verdicts", file=file)
    # The file may also contain verdicts on splits that the judge does not have to grade in this suite.
    verdicts = [verdict for verdict in run.read_verdicts(judge_id) if verdict.key in keys]
    graded_keys = {verdict.key for verdict in verdicts}
    problems = {
        "missing": len(set(keys) - graded_keys),
        "duplicate": len(verdicts) - len(graded_keys),
        "by another judge": sum(verdict.judge != judge_id for verdict in verdicts),
    }
    if any(problems.values()):
        counts = ", ".join(f"{count} {problem}" for problem, count in problems.items() if count)
        raise UserError(
            f"the file does not grade each of this run's answers exactly once ({counts}). {rejudge} again.",
            code="incomplete-verdicts",
            file=file,
        )

    identity_file = run.judge_identity_file(judge_id)
    identity = read_json(identity_file)
    available_labels = identity.get("labels") if isinstance(identity, dict) else None
    if not isinstance(available_labels, list) or any(label not in LABELS for label in available_labels):
        raise UserError(
            f"must list the labels that the judge can return. {rejudge} again.",
            code="invalid-field",
            file=identity_file,
            field="labels",
        )
    saved_config = identity.pop("config", None)
    if saved_config != config.fingerprint_fields():
        raise UserError(
            f"the verdicts were made with other settings. {rejudge} again.", code="judge-changed", file=identity_file
        )
    if config.rubric is not None and load_rubric(config.rubric).digest != identity.get("rubric"):
        raise UserError(
            f"the rubric has changed since the verdicts were made. {rejudge} again.",
            code="judge-changed",
            file=identity_file,
            field="rubric",
        )
    return JudgeVerdicts(judge_id, identity, available_labels, verdicts)


def build_row(run: GradedRun, name: str) -> Row:
    """Returns a run's row of ``summary.json`` with its assessment, under a model's name.

    A metric may need something that its judge never returns. Its rate then has no value.

    - A metric counts a label that the judge cannot return, such as `degenerate` with the published keyword judge,
      which returns only `complied` and `refused`. The metric does not apply, so its `failed` is 0.
    - A metric is the mean score of a judge that returns labels only. The `failed` of its rate counts all verdicts,
      because none has a score. The `failed` of the row does not count them, because each has a label. With
      `on_error: count_as_miss` the value is 0 instead.
    """
    metrics = run.judged_metrics(run.suite.metrics)
    paper_metrics = run.judged_metrics(run.suite.paper_metrics) if run.suite.paper_compat else {}
    benchmarks = benchmark_rates(run.suite, run.prompts, run.responses, run.benchmark_verdicts())
    rewrites = {metric: _rates_up_to_rewrite(run, config) for metric, config in metrics.items()}
    categories = {metric: _rates_by_category(run, config) for metric, config in metrics.items()}
    default_judge = run.verdicts_by_judge.get(DEFAULT_JUDGE)
    # Labels are counted for the default judge only, because it is the only one that grades all splits.
    default_verdicts = default_judge.verdicts if default_judge and default_judge.available_labels else []
    row = Row(
        model=name,
        judge=default_judge.judge_id if default_judge else "",
        metrics=_metric_rates(run, metrics) | benchmarks,
        paper=_metric_rates(run, paper_metrics),
        judges=_metric_judges(run, metrics) | _benchmark_judges(run, benchmarks),
        paper_judges=_metric_judges(run, paper_metrics),
        labels={
            split: count_labels(verdicts) for split, verdicts in _group_by_split(run.prompts, default_verdicts).items()
        },
        categories={metric: rates for metric, rates in categories.items() if rates},
        rewrites={metric: rates for metric, rates in rewrites.items() if rates},
        failed=_count_failures(run, benchmarks),
        batching=run.batching,
    )
    return row.model_copy(update={"assessment": assess(row, run.suite)})


def metric_outcomes(
    prompts: Mapping[str, Prompt],
    verdicts: Iterable[Verdict],
    metric: MetricConfig,
    available_labels: Collection[Label],
) -> Outcomes:
    """Returns how each answer (or question, depending on `metric.aggregate`) counts in one metric.

    Args:
        prompts: Prompts by id.
        verdicts: Verdicts of the metric's judge. Verdicts on other splits than the metric's are ignored.
        metric: The metric.
        available_labels: The labels that the judge can return. If one of the metric's labels is not among them, there
            are no outcomes.
    """
    verdicts_in_splits = [verdict for verdict in verdicts if prompts[verdict.prompt_id].set in metric.splits]
    if metric.score is not None:
        inverted = metric.score == "one_minus_mean"
        return score_outcomes(prompts, verdicts_in_splits, inverted=inverted, on_error=metric.on_error)
    if not set(metric.labels) <= set(available_labels):
        return Outcomes({}, {})
    return label_outcomes(prompts, verdicts_in_splits, metric.labels, metric.aggregate, metric.on_error)


def metric_rate(
    prompts: Mapping[str, Prompt],
    verdicts: Iterable[Verdict],
    metric: MetricConfig,
    available_labels: Collection[Label],
) -> Rate:
    """Returns the rate of one metric with its interval. The arguments are those of `metric_outcomes`.

    It needs no `GradedRun`, because the probe during training (`evaluation.probe`) has verdicts without a run folder.
    """
    return metric_outcomes(prompts, verdicts, metric, available_labels).rate()


def _metric_rates(run: GradedRun, metrics: Mapping[str, MetricConfig]) -> dict[str, Rate]:
    """Returns the rate of each metric over all verdicts of its judge."""
    return {
        name: _rate_over(run, metric, run.verdicts_by_judge[metric.judge].verdicts) for name, metric in metrics.items()
    }


def _rate_over(run: GradedRun, metric: MetricConfig, verdicts: Iterable[Verdict]) -> Rate:
    """Returns the rate of a metric over some of its judge's verdicts."""
    return metric_rate(run.prompts, verdicts, metric, run.verdicts_by_judge[metric.judge].available_labels)


def _rates_up_to_rewrite(run: GradedRun, metric: MetricConfig) -> list[Rate]:
    """Returns the metric's rates over the first rewrites of each question, for a growing number of rewrites.

    Each rewrite of a question has a number, from 0. The numbers can have gaps, and a question can lack some of them,
    because `sample.num_rows` draws rows and not questions.

    Returns:
        One rate per rewrite number that occurs in the metric's splits, in ascending order. Each covers the rewrites up
        to this number. The list is empty if a split of the metric has fewer than two rewrites.
    """
    rewrites_by_split: dict[str, set[int]] = {split: set() for split in metric.splits}
    for prompt in run.prompts.values():
        if prompt.set in rewrites_by_split:
            rewrites_by_split[prompt.set].add(prompt.rewrite)
    if min(map(len, rewrites_by_split.values()), default=0) < 2:
        return []
    verdicts = run.verdicts_by_judge[metric.judge].verdicts
    rates = []
    for last_rewrite in sorted(set().union(*rewrites_by_split.values())):
        up_to_last = [verdict for verdict in verdicts if run.prompts[verdict.prompt_id].rewrite <= last_rewrite]
        rates.append(_rate_over(run, metric, up_to_last))
    return rates


def _rates_by_category(run: GradedRun, metric: MetricConfig) -> dict[str, Rate]:
    """Returns the metric's rate in each category of question. Empty if the prompts have no categories."""
    verdicts_by_category: dict[str, list[Verdict]] = {}
    for verdict in run.verdicts_by_judge[metric.judge].verdicts:
        prompt = run.prompts[verdict.prompt_id]
        if prompt.category is not None and prompt.set in metric.splits:
            verdicts_by_category.setdefault(prompt.category, []).append(verdict)
    return {category: _rate_over(run, metric, verdicts) for category, verdicts in sorted(verdicts_by_category.items())}


def _metric_judges(run: GradedRun, metrics: Mapping[str, MetricConfig]) -> dict[str, str]:
    """Returns the judge of each metric that has another judge than the suite's default."""
    return {
        name: run.verdicts_by_judge[metric.judge].judge_id
        for name, metric in metrics.items()
        if metric.judge != DEFAULT_JUDGE
    }


def _benchmark_judges(run: GradedRun, benchmark_names: Collection[str]) -> dict[str, str]:
    """Returns the judge of each benchmark.

    It is `OFFICIAL_ANSWERS` if the benchmark is scored against its official answers, and also if `suite_judges` leaves
    its judge out: nothing has then scored the benchmark. The mean of several benchmarks,
    ``specificity``, gets the judge of the benchmark among them that has one.
    """
    judges = {
        benchmark.name: judge.judge_id
        for benchmark in run.suite.benchmarks
        if (judge := run.benchmark_judge(benchmark)) is not None
    }
    judge_by_benchmark = {name: judges.get(name, OFFICIAL_ANSWERS) for name in benchmark_names}
    if "specificity" in judge_by_benchmark:
        judge_by_benchmark["specificity"] = next(
            (judges[name] for name in SPECIFICITY_BENCHMARKS if name in judges), OFFICIAL_ANSWERS
        )
    return judge_by_benchmark


def _count_failures(run: GradedRun, benchmarks: Mapping[str, Rate]) -> dict[str, dict[str, int]]:
    """Counts failed answers and verdicts by judge, then by split or benchmark.

    Each failure counts once per judge, although several metrics may exclude the same verdict. A missing answer is a
    failure of every judge that should have graded it. The key `OFFICIAL_ANSWERS` stands for the benchmarks that are
    scored against their official answers.
    """
    failures: dict[str, dict[str, int]] = {}
    for judge in run.verdicts_by_judge.values():
        for split, verdicts in _group_by_split(run.prompts, judge.verdicts).items():
            failed = sum(verdict.label is None and verdict.score is None for verdict in verdicts)
            failures.setdefault(judge.judge_id, {})[split] = failed
    official = {
        benchmark.name: benchmarks[benchmark.name].failed
        for benchmark in run.suite.benchmarks
        if benchmark.judge == OFFICIAL_ANSWERS
    }
    return failures | ({OFFICIAL_ANSWERS: official} if official else {})


def _group_by_split(prompts: Mapping[str, Prompt], verdicts: Iterable[Verdict]) -> dict[str, list[Verdict]]:
    """Groups verdicts by the split or benchmark of their prompt."""
    verdicts_by_split: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        verdicts_by_split.setdefault(prompts[verdict.prompt_id].set, []).append(verdict)
    return verdicts_by_split
