"""How far two graders agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from vlm_unlearn.metrics.rates import rate
from vlm_unlearn.records import Rate

RESAMPLES = 2000


def cohen_kappa(pairs: Sequence[tuple[str, str]]) -> float | None:
    """Cohen's kappa (Cohen 1960): agreement beyond what their shares of labels would give by chance.

    Returns:
        1 for full agreement, 0 for chance's; None where both gave one and the same label throughout, which tells nothing.
    """
    n = len(pairs)
    if n == 0:
        return None
    agreed = sum(one == other for one, other in pairs) / n
    first, second = Counter(one for one, _ in pairs), Counter(other for _, other in pairs)
    chance = sum(first[label] * second[label] for label in first) / (n * n)
    return None if chance == 1 else (agreed - chance) / (1 - chance)


def kappa_rate(pairs: Sequence[tuple[str, str]], clusters: Sequence[str], failed: int = 0, seed: int = 0) -> Rate:
    """Kappa with a 95 % percentile interval, from a bootstrap over clusters (Efron & Tibshirani 1993, chapter 13).

    Resamples in which kappa is not defined are left out. `low` may be below 0.
    """
    value = cohen_kappa(pairs)
    if value is None:
        return Rate(value=None, low=None, high=None, n=len(pairs), failed=failed)
    labels = sorted({label for pair in pairs for label in pair})
    index = {label: number for number, label in enumerate(labels)}
    names = {name: number for number, name in enumerate(dict.fromkeys(clusters))}
    tables = np.zeros((len(names), len(labels), len(labels)))  # one table of label pairs a cluster
    for (one, other), cluster in zip(pairs, clusters, strict=True):
        tables[names[cluster], index[one], index[other]] += 1
    draws = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=RESAMPLES)
    drawn = np.einsum("rc,cij->rij", draws.astype(float), tables)
    total = drawn.sum(axis=(1, 2))
    agreed = np.trace(drawn, axis1=1, axis2=2) / total
    chance = (drawn.sum(axis=2) * drawn.sum(axis=1)).sum(axis=1) / total**2
    kappas = (agreed - chance)[chance < 1] / (1 - chance)[chance < 1]
    low, high = np.quantile(kappas, [0.025, 0.975])
    return Rate(value=value, low=min(float(low), value), high=max(float(high), value), n=len(pairs), failed=failed)


def hit_rates(pairs: Sequence[tuple[bool, bool]], clusters: Sequence[str], failed: int = 0) -> tuple[Rate, Rate]:
    """The true positive and the true negative rate of the second of each pair, the first being the truth."""
    rates = []
    for truth in (True, False):
        of_truth = [(said == truth, cluster) for (true, said), cluster in zip(pairs, clusters, strict=True) if true == truth]
        rates.append(rate([hit for hit, _ in of_truth], [cluster for _, cluster in of_truth], failed))
    return rates[0], rates[1]
