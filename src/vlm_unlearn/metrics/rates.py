"""Rates and their 95 % intervals."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from vlm_unlearn.records import LABELS, Label, Prompt, Rate, Verdict

OnError = Literal["exclude", "count_as_miss"]
Z = 1.959963984540054  # two-sided 95 %


def wilson_interval(successes: float, n: float) -> tuple[float, float]:
    """Returns Wilson's score interval (Wilson 1927) at 95 %. Both ends are in [0, 1].

    `n` may be an effective sample size, so neither argument needs to be an integer.
    """
    share = successes / n
    center = (share + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    low = 0.0 if successes == 0 else max(0.0, center - half)
    high = 1.0 if successes == n else min(1.0, center + half)
    return low, high


def rule_of_three(groups: int) -> float:
    """Returns the largest hit probability per group at which `groups` groups still have no hit with probability 5 %.

    The rule of three approximates it by 3 / n (Hanley and Lippman-Hand 1983). This is the exact value, the one-sided
    Clopper-Pearson bound, which is slightly smaller.
    """
    return float(1 - 0.05 ** (1 / groups))


def group_count(rate: Rate) -> int | None:
    """Returns the number of groups behind a rate of 0 or 100 %, derived from its interval, or None for other rates."""
    if rate.value not in (0, 1) or rate.low is None or rate.high is None:
        return None
    width = rate.high - rate.low
    if width == 1:
        return None
    return round(max(Z * Z * (1 - width) / width, math.log(0.05) / math.log(1 - width)))


def rate(hits: Sequence[float], clusters: Sequence[str], failed: int = 0) -> Rate:
    """Returns the share of hits, or the mean of scores, with a 95 % interval that accounts for clusters.

    The variance is the ratio estimator's over clusters (Cochran 1977, section 11.4). It is converted to an effective
    sample size for Wilson's interval, which stays in [0, 1] and is asymmetric near 0 and 1.

    - Hits: If every cluster has one answer, the result is the plain Wilson interval. Clusters never make it narrower.
    - Scores vary less than hits of the same mean, so their interval is narrower. If rare large scores are missing from
      the sample, the estimated variance is too small. Two more clusters that vary as hits do are therefore added, and
      Student's t replaces the normal distribution (Korn and Graubard 1998).
    - At 0 and 100 % the sample size is the number of clusters, and the interval reaches at least to the rule of three.

    Args:
        hits: 0 or 1 for each answer, or scores from 0 to 1.
        clusters: The cluster of each answer: answers whose errors are correlated, such as those to one question, share
            a cluster.
        failed: Answers or verdicts that failed and are not in `hits`. They are only counted.
    """
    n = len(hits)
    if n == 0:
        return Rate(value=None, low=None, high=None, n=0, failed=failed)
    value = math.fsum(hits) / n
    grouped: dict[str, list[float]] = defaultdict(list)
    for hit, cluster in zip(hits, clusters, strict=True):
        grouped[cluster].append(hit)
    count = len(grouped)
    # Exact sums do not depend on the order of the verdicts, so that the same verdicts give the same digits.
    residual = math.fsum((math.fsum(group) - value * len(group)) ** 2 for group in grouped.values())
    variance = residual * count / (max(count - 1, 1) * n * n)
    hits_only = all(hit in (0, 1) for hit in hits)
    if hits_only and count == n:
        effective = float(n)
    elif value in (0, 1) or count == 1 or (hits_only and variance < 1e-15):
        effective = float(count)
    elif hits_only:
        effective = min(float(n), value * (1 - value) / variance)
    else:
        from scipy.special import stdtrit

        variance += 2 * value * (1 - value) / (count * (count - 1))
        effective = value * (1 - value) / variance * (Z / float(stdtrit(count - 1, 0.975))) ** 2
    low, high = wilson_interval(value * effective, effective)
    if value == 0:
        high = max(high, rule_of_three(count))
    elif value == 1:
        low = min(low, 1 - rule_of_three(count))
    return Rate(value=value, low=min(low, value), high=max(high, value), n=n, failed=failed)


def bound_with_failures(rate: Rate, failed: int, in_denominator: bool = False) -> float:
    """Returns the upper bound of a rate if every failed verdict were a hit.

    It is at least the mean of the interval's upper end over the graded answers and 1 over the failed ones. It is also
    at least the upper end of Wilson's interval of the rate with these hits.

    Args:
        rate: The rate of the graded answers or questions.
        failed: The number of answers or questions without a verdict.
        in_denominator: Whether `Rate.n` contains the failed ones, as misses.
    """
    if not failed:
        return 1.0 if rate.high is None else rate.high
    total = rate.n if in_denominator else rate.n + failed
    failed = min(failed, total)
    if rate.value is None or rate.high is None:
        return 1.0
    hits = rate.value * (total if in_denominator else rate.n) + failed
    graded = total if in_denominator else rate.n
    bound = min(1.0, (rate.high * graded + failed) / total)
    return max(bound, rate.high, wilson_interval(min(hits, total), total)[1])


@dataclass(frozen=True)
class Outcomes:
    """The outcomes of answers, questions or benchmark questions, from 0 to 1. Failures are not included.

    The keys of both mappings identify the answers or questions, so that two models can be paired.
    """

    values: Mapping[Hashable, float]
    clusters: Mapping[Hashable, str]  # the group of each outcome, within which errors are correlated
    failed: int = 0  # number of failed answers and verdicts

    def rate(self) -> Rate:
        """Returns the mean outcome with its 95 % interval."""
        return rate(list(self.values.values()), [self.clusters[key] for key in self.values], self.failed)


def label_outcomes(
    prompts: Mapping[str, Prompt],
    verdicts: Iterable[Verdict],
    labels: Collection[Label],
    aggregate: Literal["any_per_question", "per_response"],
    on_error: OnError = "exclude",
) -> Outcomes:
    """Returns whether each answer, or at least one answer to each question, has one of `labels`.

    With ``any_per_question``, a question counts as a hit if at least one of its rewrites or samples has the label. A
    question with a failed verdict is excluded even if another of its answers has the label: to keep it would keep hits
    and drop misses. Failures are counted.

    Args:
        prompts: The prompts by id.
        verdicts: The verdicts of one judge.
        labels: The labels that count as a hit.
        aggregate: ``per_response`` for one outcome per answer, ``any_per_question`` for one outcome per question.
        on_error: ``exclude`` leaves failed verdicts out. ``count_as_miss`` keeps them in the denominator, as the
            published scripts do.
    """
    values: dict[Hashable, float] = {}
    # The cluster is the group, regardless of the split: the same question in two splits is not independent.
    clusters: dict[Hashable, str] = {}
    failed = 0
    hit_by_question: dict[Hashable, bool] = {}
    failed_questions: set[Hashable] = set()
    for verdict in verdicts:
        prompt = prompts[verdict.prompt_id]
        question = (prompt.set, prompt.group_id)
        failed += verdict.label is None
        clusters[question] = clusters[verdict.key] = prompt.group_id
        if verdict.label is None and on_error == "exclude":
            failed_questions.add(question)
            continue
        hit = verdict.label in labels
        hit_by_question[question] = hit or hit_by_question.get(question, False)
        values[verdict.key] = hit
    if aggregate == "any_per_question":
        values = {question: hit for question, hit in hit_by_question.items() if question not in failed_questions}
    return Outcomes(values, clusters, failed)


def score_outcomes(
    prompts: Mapping[str, Prompt], verdicts: Iterable[Verdict], inverted: bool = False, on_error: OnError = "exclude"
) -> Outcomes:
    """Returns the score of each verdict, or one minus the score if `inverted`. Failures are counted.

    A failed answer that `on_error="count_as_miss"` keeps has the outcome 0, also if `inverted`.
    """
    graded = list(verdicts)
    scored = [verdict for verdict in graded if verdict.score is not None or on_error == "count_as_miss"]
    values: dict[Hashable, float] = {
        verdict.key: 0.0 if verdict.score is None else 1 - verdict.score if inverted else verdict.score
        for verdict in scored
    }
    clusters: dict[Hashable, str] = {verdict.key: prompts[verdict.prompt_id].group_id for verdict in scored}
    return Outcomes(values, clusters, sum(verdict.score is None for verdict in graded))


def mean_ratio(ratios: Sequence[Sequence[tuple[str, float, float]]], failed: int = 0) -> Rate:
    """Returns the mean of several ratios of sums, such as the F1 of several files, with an interval over clusters.

    The variance is that of the linearized ratios (Cochran 1977, section 11.4), summed by cluster over all ratios: an
    image that is in each of POPE's files is one cluster. It is converted to an effective sample size for Wilson's
    interval, as in `rate`, of at most `n` answers.

    Args:
        ratios: For each ratio one ``(cluster, numerator, denominator)`` per answer. If a ratio has no answers, the
            mean has no value.
        failed: Answers that failed and are not in `ratios`. They are only counted.

    Returns:
        The rate. A mean above 1, such as a judge's score relative to a worse reference, is reported as 1.
    """
    n = sum(map(len, ratios))
    if not ratios or not all(ratios):
        return Rate(value=None, low=None, high=None, n=n, failed=failed)
    values = []
    residuals: dict[str, list[float]] = defaultdict(list)
    for terms in ratios:
        total = math.fsum(denominator for _, _, denominator in terms)
        value = math.fsum(numerator for _, numerator, _ in terms) / total if total else 0.0
        values.append(value)
        for cluster, numerator, denominator in terms:
            residuals[cluster].append((numerator - value * denominator) / (total * len(ratios)) if total else 0.0)
    mean, count = min(1.0, math.fsum(values) / len(values)), len(residuals)
    variance = math.fsum(math.fsum(residual) ** 2 for residual in residuals.values()) * count / max(count - 1, 1)
    effective = min(float(n), mean * (1 - mean) / variance) if 0 < mean < 1 and variance > 0 else float(count)
    low, high = wilson_interval(mean * effective, effective)
    return Rate(value=mean, low=min(low, mean), high=max(high, mean), n=n, failed=failed)


def mean_of_rates(rates: Sequence[Rate]) -> Rate:
    """Returns the mean of independent rates, with an interval that is recovered from their intervals.

    If a rate has no value, the mean has none. `n` and `failed` are summed. Source: Zou and Donner 2008,
    doi 10.1002/sim.3095.
    """
    n, failed = sum(rate.n for rate in rates), sum(rate.failed for rate in rates)
    bounds = [
        (rate.value, rate.low, rate.high)
        for rate in rates
        if rate.value is not None and rate.low is not None and rate.high is not None
    ]
    if not rates or len(bounds) < len(rates):
        return Rate(value=None, low=None, high=None, n=n, failed=failed)
    mean = math.fsum(value for value, _, _ in bounds) / len(bounds)
    below = math.sqrt(math.fsum((value - low) ** 2 for value, low, _ in bounds)) / len(bounds)
    above = math.sqrt(math.fsum((high - value) ** 2 for value, _, high in bounds)) / len(bounds)
    return Rate(value=mean, low=max(0.0, mean - below), high=min(1.0, mean + above), n=n, failed=failed)


def count_labels(verdicts: Iterable[Verdict]) -> dict[str, int]:
    """Returns the number of answers with each label, and as ``failed`` the verdicts without a label or a score."""
    counts = dict.fromkeys([*LABELS, "failed"], 0)
    for verdict in verdicts:
        if verdict.label is not None or verdict.score is None:
            counts[verdict.label or "failed"] += 1
    return counts
