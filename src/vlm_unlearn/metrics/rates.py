"""Rates and their 95 % intervals."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Literal

from vlm_unlearn.records import LABELS, Label, Prompt, Rate, Verdict

Failures = Literal["left_out", "not_counted_as_hits"]
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


def rate(hits: Sequence[float], clusters: Sequence[str], failed: int = 0) -> Rate:
    """The share of `hits`, or the mean of scores between 0 and 1, with an interval that allows for clusters.

    Scores between 0 and 1 vary less than hits of the same mean: for them the interval is on the wide side.

    Where clusters have several members the variance is the ratio estimator's (Cochran 1977, section 11.4), turned into an
    effective sample size for Wilson's interval, so that the ends stay in [0, 1] at 0 and 100 %. Single clusters give the plain Wilson
    interval; at 0 and 100 % the number of clusters is taken as the sample size.
    """
    n = len(hits)
    if n == 0:
        return Rate(value=None, low=None, high=None, n=0, failed=failed)
    value = sum(hits) / n
    grouped: dict[str, list[float]] = defaultdict(list)
    for hit, cluster in zip(hits, clusters, strict=True):
        grouped[cluster].append(hit)
    effective = float(n)
    count = len(grouped)
    if count < n:
        effective = float(count)
        residual = sum((sum(group) - value * len(group)) ** 2 for group in grouped.values())
        variance = residual * count / (max(count - 1, 1) * n * n)
        if 0 < value < 1 and variance > 0:
            effective = min(float(n), value * (1 - value) / variance)
    low, high = wilson_interval(value * effective, effective)
    return Rate(value=value, low=min(low, value), high=max(high, value), n=n, failed=failed)


def label_rate(
    prompts: Mapping[str, Prompt],
    verdicts: Iterable[Verdict],
    labels: Collection[Label],
    group: Literal["any", "each"],
    failures: Failures = "left_out",
) -> Rate:
    """The share of answers (``each``) or of questions (``any``) whose label is one of `labels`.

    With ``any`` a question counts as soon as one of its shots or samples has the label. A question that has a failed verdict and
    no such label can't be told and is left out; failures are counted in either case.

    Args:
        failures: ``not_counted_as_hits`` keeps failed verdicts in the denominator, as the published scripts do.
    """
    hits: list[bool] = []
    clusters: list[str] = []
    failed = 0
    broken: dict[str, bool | None] = {}  # None: a verdict failed and no other settles it
    for verdict in verdicts:
        prompt = prompts[verdict.prompt_id]
        question = f"{prompt.set}/{prompt.group_id}"
        failed += verdict.label is None
        if verdict.label is None and failures == "left_out":
            broken[question] = broken.get(question) or None
            continue
        hit = verdict.label in labels
        broken[question] = True if hit else broken.get(question, False)
        hits.append(hit)
        clusters.append(prompt.group_id)  # the same question in two cases is not asked independently
    if group == "any":
        told = {cluster: outcome for cluster, outcome in broken.items() if outcome is not None}
        return rate(list(told.values()), list(told), failed)
    return rate(hits, clusters, failed)


def score_rate(prompts: Mapping[str, Prompt], verdicts: Iterable[Verdict], inverted: bool = False, failures: Failures = "left_out") -> Rate:
    """The mean of the verdicts' scores, or with `inverted` of what each lacks to 1; arguments else as in `label_rate`."""
    found = list(verdicts)
    kept = [verdict for verdict in found if verdict.score is not None or failures != "left_out"]
    # A failed answer is no hit either way: 0, and not 1 - 0.
    scores = [0.0 if verdict.score is None else 1 - verdict.score if inverted else verdict.score for verdict in kept]
    failed = sum(verdict.score is None for verdict in found)
    return rate(scores, [prompts[verdict.prompt_id].group_id for verdict in kept], failed)


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
        (rate.value, rate.low, rate.high) for rate in rates if rate.value is not None and rate.low is not None and rate.high is not None
    ]
    if not rates or len(told) < len(rates):
        return Rate(value=None, low=None, high=None, n=n, failed=failed)
    mean = sum(value for value, _, _ in told) / len(told)
    below = math.sqrt(sum((value - low) ** 2 for value, low, _ in told)) / len(told)
    above = math.sqrt(sum((high - value) ** 2 for value, _, high in told)) / len(told)
    return Rate(value=mean, low=mean - below, high=mean + above, n=n, failed=failed)


def count_labels(verdicts: Iterable[Verdict]) -> dict[str, int]:
    """How many answers got each label; ``failed`` are those without one."""
    counts = dict.fromkeys([*LABELS, "failed"], 0)
    for verdict in verdicts:
        counts[verdict.label or "failed"] += 1
    return counts
