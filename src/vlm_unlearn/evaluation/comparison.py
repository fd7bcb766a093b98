"""Compares finished runs prompt by prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from vlm_unlearn.benchmarks import AnswersNotPublicError
from vlm_unlearn.config import BenchmarkConfig, MetricConfig
from vlm_unlearn.errors import UserError, quoted
from vlm_unlearn.evaluation.benchmarks import benchmark_outcomes
from vlm_unlearn.evaluation.generate import saved_suite
from vlm_unlearn.evaluation.scoring import GradedRun, build_row, metric_outcomes, read_graded_run
from vlm_unlearn.metrics.paired import PairedDifference, holm, paired_difference
from vlm_unlearn.metrics.rates import Outcomes
from vlm_unlearn.records import Comparison, Row, Summary

OnCompared = Callable[[int, int], None]  # models compared, and how many there are
Pairs = tuple[str, str, PairedDifference, int]  # model, metric, difference, unpaired


def summarize_runs(runs: Mapping[str, Path], on_done: OnCompared | None = None) -> tuple[Summary, list[str]]:
    """Each run's row, with those compared to the first that can be; returns and raises as `compare_runs`, but where two runs have
    nothing to compare, that is among the reasons."""
    if len(runs) == 1:
        name, folder = next(iter(runs.items()))
        return Summary(rows=[build_row(_read(folder), name)]), []
    return _compare(runs, refuse=False, on_done=on_done)


def compare_runs(runs: Mapping[str, Path], on_done: OnCompared | None = None) -> tuple[Summary, list[str]]:
    """Each run against the first, in every metric that the two share, over the prompts that both were asked.

    A metric over other cases in the two suites is compared over the cases of both.

    Args:
        runs: evaluation folder of each model, the base first.
        on_done: told of each run that is compared: runs done, runs in all.

    Returns:
        Rows and comparisons, and what was not compared, with the reason.

    Raises:
        UserError: a run is not finished or not graded, or has no prompt or metric in common with the base, or another judge.
    """
    return _compare(runs, refuse=True, on_done=on_done)


def _compare(runs: Mapping[str, Path], refuse: bool, on_done: OnCompared | None) -> tuple[Summary, list[str]]:
    names = list(runs)
    base = _read(runs[names[0]])
    rows: list[Row] = [build_row(base, names[0])]
    found: list[Pairs] = []
    left_out: list[str] = []
    for done, name in enumerate(names[1:], start=1):
        run = _read(runs[name])
        rows.append(build_row(run, name))
        try:
            compared, reasons = _compare_two(base, run, name, f"{runs[names[0]]} and {runs[name]}")
        except UserError as error:
            if refuse:
                raise
            compared, reasons = [], [f"{name}: {error}"]
        found += compared
        left_out += reasons
        if on_done:
            on_done(done, len(names) - 1)
    return Summary(rows=rows, comparisons=list(_adjusted(found, names[0]))), left_out


def _compare_two(base: GradedRun, run: GradedRun, name: str, where: str) -> tuple[list[Pairs], list[str]]:
    """The differences, and what has none.

    Raises:
        UserError: there is nothing to compare, or two judges graded.
    """
    found: list[Pairs] = []
    left_out: list[str] = []
    if not any(base.prompts.get(id) == prompt for id, prompt in run.prompts.items()):
        raise UserError(f"{where}: were asked no prompt in common; compare runs of the same suite on the same data")
    for metric in base.measured(base.suite.metrics):
        if metric not in run.measured(run.suite.metrics):
            continue
        compared = _compared(base, run, metric, where)
        if isinstance(compared, str):
            left_out.append(f"{name}, {metric}: {compared}")
        else:
            found.append((name, metric, *compared))
    for benchmark in base.suite.benchmarks:
        scored = _compared_benchmark(base, run, benchmark)
        if isinstance(scored, str):
            left_out.append(f"{name}, {benchmark.name}: {scored}")
        elif scored is not None:
            found.append((name, benchmark.name, *scored))
    if not found:
        raise UserError(
            f"{where}: share no metric that can be compared" + "".join(f"; {reason}" for reason in left_out[:1])
        )
    return found, left_out


def _read(folder: Path) -> GradedRun:
    return read_graded_run(folder, saved_suite(folder))


def _compared(base: GradedRun, run: GradedRun, metric: str, where: str) -> tuple[PairedDifference, int] | str:
    """The difference in one metric and how many outcomes have no partner, or why there is none."""
    first, second = base.suite.metrics[metric], run.suite.metrics[metric]
    if first.model_dump(exclude={"splits"}) != second.model_dump(exclude={"splits"}):
        return "the two suites count it differently"
    judges = base.graded[first.judge], run.graded[first.judge]
    if judges[0].identity != judges[1].identity:
        different = " and ".join(dict.fromkeys(f"judge-{judge.judge}.json" for judge in judges))
        raise UserError(
            f"{where}: {quoted(metric)} was graded by two judges ({different} differ); "
            "grade both with the same one by `vlm-unlearn judge run`"
        )
    both = first.model_copy(update={"splits": [case for case in first.splits if case in second.splits]})
    shared = {
        verdict.key
        for verdict in judges[0].verdicts
        if run.prompts.get(verdict.prompt_id) == base.prompts[verdict.prompt_id]
    }
    shared &= {verdict.key for verdict in judges[1].verdicts}
    old, new = _outcomes(base, both, shared), _outcomes(run, both, shared)
    known = _outcomes(base, both).values.keys() | _outcomes(run, both).values.keys()
    return _difference(old, new, len(known))


def _compared_benchmark(
    base: GradedRun, run: GradedRun, config: BenchmarkConfig
) -> tuple[PairedDifference, int] | str | None:
    """The difference in a benchmark's mean score (of POPE the accuracy), question by question; None where the run doesn't have it."""
    other = next((benchmark for benchmark in run.suite.benchmarks if benchmark.name == config.name), None)
    if other is None:
        return None
    asked, other_asked = ({id: one for id, one in of.prompts.items() if one.set == config.name} for of in (base, run))
    if asked != other_asked:
        return "the two runs were asked other questions of it"
    if config.official != other.official:
        return "one of the two is counted as official, the other isn't"
    try:
        old, new = (
            benchmark_outcomes(of_run, read.prompts, read.responses, read.judged())
            for of_run, read in ((config, base), (other, run))
        )
    except AnswersNotPublicError:
        return "its answers are not public"
    return _difference(old, new, len(old.values.keys() | new.values.keys()))


def _difference(old: Outcomes, new: Outcomes, known: int) -> tuple[PairedDifference, int] | str:
    """The paired difference, and how many of `known` outcomes have no partner."""
    pairs = [key for key in old.values if key in new.values]
    if not pairs:
        return "no answer in common has a verdict in both"
    before, after = [old.values[key] for key in pairs], [new.values[key] for key in pairs]
    return paired_difference(before, after, [old.clusters[key] for key in pairs]), known - len(pairs)


def _outcomes(run: GradedRun, metric: MetricConfig, among: set[tuple[str, int]] | None = None) -> Outcomes:
    graded = run.graded[metric.judge]
    verdicts = graded.verdicts if among is None else [verdict for verdict in graded.verdicts if verdict.key in among]
    return metric_outcomes(run.prompts, verdicts, metric, graded.labels)


def _adjusted(found: list[Pairs], base: str) -> Iterator[Comparison]:
    """With p-values that allow for all of them being looked at."""
    adjusted = holm([difference.p for _, _, difference, _ in found])
    for (model, metric, difference, unpaired), p_adjusted in zip(found, adjusted, strict=True):
        yield Comparison(
            model=model,
            base=base,
            metric=metric,
            difference=difference.value,
            low=difference.low,
            high=difference.high,
            p=difference.p,
            p_adjusted=p_adjusted,
            test=difference.test,
            n=difference.n,
            unpaired=unpaired,
        )
