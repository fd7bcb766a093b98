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
    """Wilson's score interval (Wilson 1927) at 95 %, both ends in [0, 1].

    `n` may be an effective sample size, so neither needs to be whole.
    """
    share = successes / n
    centre = (share + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return low, high


def rule_of_three(groups: int) -> float:
    """The largest share that still gives no hit in `groups` groups with a probability of 5 %: about 3 / n (Hanley and Lippman-Hand 1983).

    This is the exact bound, Clopper and Pearson's one-sided one. 3 / n is on the safe side of it.
    """
    return float(1 - 0.05 ** (1 / groups))


def group_count(rate: Rate) -> int | None:
    """How many groups a rate of 0 or 100 % rests on, which the far end of its interval tells; None for any other rate."""
    if rate.value not in (0, 1) or rate.low is None or rate.high is None:
        return None
    width = rate.high - rate.low
    if width == 1:
        return None
    return round(max(Z * Z * (1 - width) / width, math.log(0.05) / math.log(1 - width)))


def rate(hits: Sequence[float], clusters: Sequence[str], failed: int = 0) -> Rate:
    """The share of `hits`, or the mean of scores between 0 and 1, with an interval that allows for clusters.

    The variance is the ratio estimator's over clusters (Cochran 1977, section 11.4), turned into an effective sample size for
    Wilson's interval, so that the ends stay in [0, 1] and lean to the middle near 0 and 1.

    Hits: single clusters give the plain Wilson interval, and clusters never a narrower one. Scores vary less than hits of the same
    mean, so theirs is narrower. Their variance is an estimate that is too small while the rare large scores are unseen, so two
    more clusters that vary as hits do are counted in, and Student's t replaces the normal (Korn and Graubard 1998). At 0 and 100 %
    the number of clusters is the sample size, and the interval reaches the rule of three at least.
    """
    n = len(hits)
    if n == 0:
        return Rate(value=None, low=None, high=None, n=0, failed=failed)
    value = math.fsum(hits) / n
    grouped: dict[str, list[float]] = defaultdict(list)
    for hit, cluster in zip(hits, clusters, strict=True):
        grouped[cluster].append(hit)
    count = len(grouped)
    residual = sum((sum(group) - value * len(group)) ** 2 for group in grouped.values())
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


@dataclass(frozen=True)
class Outcomes:
    """How each answer, question or benchmark question counted, from 0 to 1, by what tells it from the others; failures are in none."""

    values: Mapping[Hashable, float]
    clusters: Mapping[Hashable, str]  # the group whose members err alike
    failed: int = 0  # answers or verdicts

    def rate(self) -> Rate:
        """Their mean, with its interval."""
        return rate(list(self.values.values()), [self.clusters[key] for key in self.values], self.failed)


def label_outcomes(
    prompts: Mapping[str, Prompt],
    verdicts: Iterable[Verdict],
    labels: Collection[Label],
    aggregate: Literal["any_per_question", "per_response"],
    on_error: OnError = "exclude",
) -> Outcomes:
    """Whether the label of each answer (``each``) or of one of each question's answers (``any``) is one of `labels`.

    With ``any`` a question counts as soon as one of its shots or samples has the label. A question that has a failed verdict is left
    out, whatever its others say: to keep only those that another shot settles would keep hits and drop misses. Failures are counted.

    Args:
        on_error: ``count_as_miss`` keeps failed verdicts in the denominator, as the published scripts do.
    """
    values: dict[Hashable, float] = {}
    clusters: dict[
        Hashable, str
    ] = {}  # by group, whatever the case: the same question in two cases is not asked independently
    failed = 0
    broken: dict[Hashable, bool] = {}
    untold: set[Hashable] = set()  # questions with a failed verdict
    for verdict in verdicts:
        prompt = prompts[verdict.prompt_id]
        question = (prompt.set, prompt.group_id)
        failed += verdict.label is None
        clusters[question] = clusters[verdict.key] = prompt.group_id
        if verdict.label is None and on_error == "exclude":
            untold.add(question)
            continue
        hit = verdict.label in labels
        broken[question] = hit or broken.get(question, False)
        values[verdict.key] = hit
    if aggregate == "any_per_question":
        values = {question: outcome for question, outcome in broken.items() if question not in untold}
    return Outcomes(values, clusters, failed)


def score_outcomes(
    prompts: Mapping[str, Prompt], verdicts: Iterable[Verdict], inverted: bool = False, on_error: OnError = "exclude"
) -> Outcomes:
    """The verdicts' scores, or with `inverted` what each lacks to 1; arguments else as in `label_outcomes`."""
    found = list(verdicts)
    kept = [verdict for verdict in found if verdict.score is not None or on_error != "exclude"]
    # A failed answer is no hit either way: 0, and not 1 - 0.
    values: dict[Hashable, float] = {
        verdict.key: 0.0 if verdict.score is None else 1 - verdict.score if inverted else verdict.score
        for verdict in kept
    }
    clusters: dict[Hashable, str] = {verdict.key: prompts[verdict.prompt_id].group_id for verdict in kept}
    return Outcomes(values, clusters, sum(verdict.score is None for verdict in found))


def mean_ratio(parts: Sequence[Sequence[tuple[str, float, float]]], failed: int = 0) -> Rate:
    """The mean of ratios of sums, such as F1 over several files, with an interval that allows for clusters.

    The variance is that of the linearised ratios (Cochran 1977, section 11.4), summed by cluster over all parts: an image that is in
    each of POPE's files is one cluster. It becomes an effective sample size for Wilson's interval, as in `rate`, of no more than
    `n` answers.

    Args:
        parts: of each ratio ``(cluster, above, below)``, one an answer. A part without answers leaves the mean without a value.
    """
    n = sum(map(len, parts))
    if not parts or not all(parts):
        return Rate(value=None, low=None, high=None, n=n, failed=failed)
    values = []
    residuals: dict[str, float] = defaultdict(float)
    for part in parts:
        below = sum(line for _, _, line in part)
        value = sum(above for _, above, _ in part) / below if below else 0.0
        values.append(value)
        for cluster, above, line in part:
            residuals[cluster] += (above - value * line) / (below * len(parts)) if below else 0.0
    mean, count = sum(values) / len(values), len(residuals)
    variance = sum(residual**2 for residual in residuals.values()) * count / max(count - 1, 1)
    effective = min(float(n), mean * (1 - mean) / variance) if 0 < mean < 1 and variance > 0 else float(count)
    low, high = wilson_interval(mean * effective, effective)
    return Rate(value=mean, low=min(low, mean), high=max(high, mean), n=n, failed=failed)


def mean_of_rates(rates: Sequence[Rate]) -> Rate:
    """The mean of independent rates, its interval recovered from theirs (Zou and Donner 2008, doi 10.1002/sim.3095).

    A rate without a value leaves the mean without one. `n` and `failed` are summed.
    """
    n, failed = sum(rate.n for rate in rates), sum(rate.failed for rate in rates)
    told = [
        (rate.value, rate.low, rate.high)
        for rate in rates
        if rate.value is not None and rate.low is not None and rate.high is not None
    ]
    if not rates or len(told) < len(rates):
        return Rate(value=None, low=None, high=None, n=n, failed=failed)
    mean = sum(value for value, _, _ in told) / len(told)
    below = math.sqrt(sum((value - low) ** 2 for value, low, _ in told)) / len(told)
    above = math.sqrt(sum((high - value) ** 2 for value, _, high in told)) / len(told)
    return Rate(value=mean, low=max(0.0, mean - below), high=min(1.0, mean + above), n=n, failed=failed)


def count_labels(verdicts: Iterable[Verdict]) -> dict[str, int]:
    """How many answers got each label; ``failed`` are those without one."""
    counts = dict.fromkeys([*LABELS, "failed"], 0)
    for verdict in verdicts:
        if verdict.label is not None or verdict.score is None:
            counts[verdict.label or "failed"] += 1
    return counts
