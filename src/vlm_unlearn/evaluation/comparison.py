"""Paired comparison of finished runs: the same prompts, answered by two models."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from vlm_unlearn.benchmarks import AnswersNotPublicError
from vlm_unlearn.config import BenchmarkConfig, MetricConfig, Suite
from vlm_unlearn.errors import UserError, quoted
from vlm_unlearn.evaluation.benchmarks import benchmark_outcomes
from vlm_unlearn.evaluation.generate import saved_suite
from vlm_unlearn.evaluation.scoring import GradedRun, JudgeVerdicts, build_row, metric_outcomes, read_graded_run
from vlm_unlearn.metrics.paired import PairedDifference, holm, paired_difference
from vlm_unlearn.metrics.rates import Outcomes
from vlm_unlearn.records import Comparison, Row, Summary
from vlm_unlearn.store import EvaluationRun, RunDirectory, user_path, validate_model_files

LOCAL_BACKENDS = ("hf", "vllm")  # their models are folders
OnCompared = Callable[[int, int], None]  # models compared so far, models to compare


@dataclass(frozen=True)
class _MetricChange:
    """The change of one metric from the base run to another run, before the p-values are adjusted."""

    metric: str
    difference: PairedDifference
    unpaired: int  # outcomes that only one of the two runs has


def summarize_runs(runs: Mapping[str, Path], on_done: OnCompared | None = None) -> tuple[Summary, list[str]]:
    """Returns every run's row, and compares the runs with the first one as far as possible.

    It differs from `compare_runs` in two ways. A single run is allowed. A run that cannot be compared with the first
    one is not an error: it keeps its row, and the reason is in the returned list.
    """
    if len(runs) == 1:
        name, run = next(iter(runs.items()))
        return Summary(rows=[build_row(_read_run(run), name)]), []
    return _compare(runs, strict=False, on_done=on_done)


def compare_runs(runs: Mapping[str, Path], on_done: OnCompared | None = None) -> tuple[Summary, list[str]]:
    """Compares each run with the first one in every metric that both have, over the prompts that both were asked.

    If a metric covers different splits in the two suites, it is compared over the splits that both have.

    Args:
        runs: The evaluation folder of each model, the base model first.
        on_done: Called after each comparison with the number of comparisons done and their total number.

    Returns:
        The rows with the comparisons, and a list of the metrics that were not compared, with the reasons.

    Raises:
        UserError: A run is unfinished or not graded, shares no prompt or no metric with the base, or a metric or
            benchmark of it was graded by another judge. Its model is on this machine, and the model's weight files
            are not those of a model.
    """
    for run in runs.values():
        _check_model(saved_suite(run))
    return _compare(runs, strict=True, on_done=on_done)


def _compare(runs: Mapping[str, Path], strict: bool, on_done: OnCompared | None) -> tuple[Summary, list[str]]:
    base_name, *names = runs
    base = _read_run(runs[base_name])
    rows: list[Row] = [build_row(base, base_name)]
    changes: list[tuple[str, _MetricChange]] = []
    skipped: list[str] = []
    for done, name in enumerate(names, start=1):
        run = _read_run(runs[name])
        rows.append(build_row(run, name))
        try:
            run_changes, reasons = _compare_with_base(base, run, f"{runs[base_name]} and {runs[name]}")
        except UserError as error:
            if strict:
                raise
            skipped.append(f"{name}: {error}")
        else:
            changes += [(name, change) for change in run_changes]
            skipped += [f"{name}, {reason}" for reason in reasons]
        if on_done:
            on_done(done, len(names))
    return Summary(rows=rows, comparisons=list(_adjust_p_values(changes, base_name))), skipped


def _check_model(suite: Suite) -> None:
    """Checks the weight files of a run's model, if it is on this machine. An adapter with a renamed tensor has the
    answers of its base model.

    Raises:
        UserError: As `validate_model_files`.
    """
    if suite.generation.backend not in LOCAL_BACKENDS:
        return
    folder = user_path(suite.model)
    if not (folder / "config.json").is_file() and RunDirectory(folder).exists():
        folder = RunDirectory(folder).model
    if folder.is_dir():
        validate_model_files(folder)


def _read_run(run: Path) -> GradedRun:
    return read_graded_run(run, saved_suite(run))


def _compare_with_base(base: GradedRun, run: GradedRun, folders: str) -> tuple[list[_MetricChange], list[str]]:
    """Compares one run with the base run.

    Args:
        base: The base run.
        run: The other run.
        folders: Both run folders, for error messages.

    Returns:
        The changes, and for each metric that cannot be compared ``"METRIC: REASON"``.

    Raises:
        UserError: Nothing can be compared, or a metric or benchmark was graded by two different judges.
    """
    if not any(base.prompts.get(id) == prompt for id, prompt in run.prompts.items()):
        raise UserError(
            "the two runs have no prompt in common. Compare runs of the same suite on the same data.",
            code="no-common-prompts",
            file=folders,
        )
    results: list[tuple[str, _MetricChange | str]] = []
    for metric in base.judged_metrics(base.suite.metrics):
        if metric in run.judged_metrics(run.suite.metrics):
            results.append((metric, _compare_metric(base, run, metric, folders)))
    for benchmark in base.suite.benchmarks:
        if (result := _compare_benchmark(base, run, benchmark, folders)) is not None:
            results.append((benchmark.name, result))
    changes = [result for _, result in results if not isinstance(result, str)]
    reasons = [f"{name}: {result}" for name, result in results if isinstance(result, str)]
    if not changes:
        reason = f" ({reasons[0]})" if reasons else ""
        raise UserError(
            f"the two runs share no metric that can be compared{reason}. Compare runs of the same suite.",
            code="no-common-metrics",
            file=folders,
        )
    return changes, reasons


def _compare_metric(base: GradedRun, run: GradedRun, metric: str, folders: str) -> _MetricChange | str:
    """Returns the change of one metric, or the reason why it cannot be compared.

    Raises:
        UserError: Two different judges graded the metric.
    """
    base_config, run_config = base.suite.metrics[metric], run.suite.metrics[metric]
    if base_config.model_dump(exclude={"splits"}) != run_config.model_dump(exclude={"splits"}):
        return "the two suites count it differently"
    base_judge = base.verdicts_by_judge[base_config.judge]
    run_judge = run.verdicts_by_judge[base_config.judge]
    _validate_same_judge(metric, base_judge, run_judge, folders)
    config = base_config.model_copy(
        update={"splits": [split for split in base_config.splits if split in run_config.splits]}
    )
    # Outcomes per question depend on all verdicts of the question, so verdicts are paired before they are counted.
    paired_keys = {
        verdict.key
        for verdict in base_judge.verdicts
        if run.prompts.get(verdict.prompt_id) == base.prompts[verdict.prompt_id]
    }
    paired_keys &= {verdict.key for verdict in run_judge.verdicts}
    return _paired_change(
        metric,
        _metric_outcomes(base, config, paired_keys),
        _metric_outcomes(run, config, paired_keys),
        len(_metric_outcomes(base, config).values.keys() | _metric_outcomes(run, config).values.keys()),
    )


def _validate_same_judge(metric: str, base_judge: JudgeVerdicts, run_judge: JudgeVerdicts, folders: str) -> None:
    """Raises an error if a metric or benchmark was graded by two different judges, or by two versions of one judge.

    Raises:
        UserError: The judges differ.
    """
    if base_judge.identity != run_judge.identity:
        names = (EvaluationRun.JUDGE_IDENTITY.format(judge.judge_id) for judge in (base_judge, run_judge))
        files = " and ".join(dict.fromkeys(names))
        raise UserError(
            f"{quoted(metric)} was graded by two different judges ({files} differ). "
            "Grade both runs with the same judge by `vlm-unlearn judge run`.",
            code="judge-mismatch",
            file=folders,
        )


def _metric_outcomes(run: GradedRun, metric: MetricConfig, keys: Collection[tuple[str, int]] | None = None) -> Outcomes:
    """Returns a metric's outcomes from all verdicts of its judge, or from those on the answers with `keys`."""
    judge = run.verdicts_by_judge[metric.judge]
    verdicts = [verdict for verdict in judge.verdicts if keys is None or verdict.key in keys]
    return metric_outcomes(run.prompts, verdicts, metric, judge.available_labels)


def _compare_benchmark(
    base: GradedRun, run: GradedRun, config: BenchmarkConfig, folders: str
) -> _MetricChange | str | None:
    """Compares a benchmark question by question.

    The compared value is the mean score. For POPE that is the accuracy, although its headline is F1.

    Returns:
        The change, the reason why there is none, or None if the run does not include the benchmark.

    Raises:
        UserError: Two different judges graded the benchmark.
    """
    run_config = next((benchmark for benchmark in run.suite.benchmarks if benchmark.name == config.name), None)
    if run_config is None:
        return None
    base_prompts, run_prompts = (
        {id: prompt for id, prompt in graded.prompts.items() if prompt.set == config.name} for graded in (base, run)
    )
    if base_prompts != run_prompts:
        return "the two runs were asked different questions of it"
    if config.official != run_config.official:
        return "only one of the two runs uses the official counting"
    base_judge, run_judge = base.benchmark_judge(config), run.benchmark_judge(run_config)
    if base_judge is not None and run_judge is not None:
        _validate_same_judge(config.name, base_judge, run_judge, folders)
    try:
        base_outcomes = benchmark_outcomes(config, base.prompts, base.responses, base.benchmark_verdicts())
        run_outcomes = benchmark_outcomes(run_config, run.prompts, run.responses, run.benchmark_verdicts())
    except AnswersNotPublicError:
        return "its answers are not public"
    total = len(base_outcomes.values.keys() | run_outcomes.values.keys())
    return _paired_change(config.name, base_outcomes, run_outcomes, total)


def _paired_change(metric: str, base: Outcomes, run: Outcomes, total: int) -> _MetricChange | str:
    """Returns the paired difference of the outcomes that both runs have, or the reason why there is none.

    Args:
        metric: The metric or benchmark.
        base: The base run's outcomes.
        run: The other run's outcomes.
        total: How many outcomes at least one of the two runs has.
    """
    keys = [key for key in base.values if key in run.values]
    if not keys:
        return "no common answer has a verdict in both runs"
    difference = paired_difference(
        [base.values[key] for key in keys], [run.values[key] for key in keys], [base.clusters[key] for key in keys]
    )
    return _MetricChange(metric, difference, unpaired=total - len(keys))


def _adjust_p_values(changes: list[tuple[str, _MetricChange]], base: str) -> Iterator[Comparison]:
    """Yields the comparisons of all models and metrics, with p-values adjusted for their number (Holm's method)."""
    adjusted = holm([change.difference.p for _, change in changes])
    for (model, change), p_adjusted in zip(changes, adjusted, strict=True):
        yield Comparison(
            model=model,
            base=base,
            metric=change.metric,
            difference=change.difference.value,
            low=change.difference.low,
            high=change.difference.high,
            p=change.difference.p,
            p_adjusted=p_adjusted,
            test=change.difference.test,
            n=change.difference.n,
            unpaired=change.unpaired,
        )
