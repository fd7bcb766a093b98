"""How far two graders agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from vlm_unlearn.metrics.rates import rate, rule_of_three
from vlm_unlearn.records import Kappa, Rate

RESAMPLES, CHUNK = 2000, 100


def cohen_kappa(pairs: Sequence[tuple[str, str]]) -> float | None:
    """Cohen's kappa (Cohen 1960): agreement beyond what their shares of labels would give by chance.

    Returns:
        1 for full agreement, 0 for chance's; None where both gave one and the same label throughout, which tells nothing.
    """
    n = len(pairs)
    if n == 0:
        return None
    agreed, chance = sum(one == other for one, other in pairs) / n, _chance(pairs)
    return None if chance == 1 else (agreed - chance) / (1 - chance)


def _chance(pairs: Sequence[tuple[str, str]]) -> float:
    """The agreement that the shares of labels would give by chance."""
    first, second = Counter(one for one, _ in pairs), Counter(other for _, other in pairs)
    return sum(first[label] * second[label] for label in first) / len(pairs) ** 2


def kappa_rate(pairs: Sequence[tuple[str, str]], clusters: Sequence[str], failed: int = 0) -> Kappa:
    """Kappa with a 95 % percentile interval, from a bootstrap over clusters (Efron & Tibshirani 1993, chapter 13).

    Resamples in which kappa is not defined are left out. `low` may be below 0.
    """
    value = cohen_kappa(pairs)
    if value is None:
        return Kappa(value=None, low=None, high=None, n=len(pairs), failed=failed)
    labels = sorted({label for pair in pairs for label in pair})
    index = {label: number for number, label in enumerate(labels)}
    names = {name: number for number, name in enumerate(dict.fromkeys(clusters))}
    tables = np.zeros((len(names), len(labels), len(labels)))  # one table of label pairs a cluster
    for (one, other), cluster in zip(pairs, clusters, strict=True):
        tables[names[cluster], index[one], index[other]] += 1
    rng = np.random.default_rng(0)
    kappas = np.concatenate([_resampled(rng, tables) for _ in range(RESAMPLES // CHUNK)])
    low, high = np.quantile(kappas, [0.025, 0.975])
    if high - low < 1e-9:  # nothing varied: then the rule of three allows so many disagreements
        low = max(-1.0, value - rule_of_three(len(names)) / (1 - _chance(pairs)))
    return Kappa(value=value, low=min(float(low), value), high=max(float(high), value), n=len(pairs), failed=failed)


def _resampled(rng: np.random.Generator, tables: np.ndarray) -> np.ndarray:
    """The kappas of a chunk of resamples."""
    draws = rng.multinomial(len(tables), np.full(len(tables), 1 / len(tables)), size=CHUNK)
    drawn = np.einsum("rc,cij->rij", draws.astype(float), tables)
    total = drawn.sum(axis=(1, 2))
    agreed = np.trace(drawn, axis1=1, axis2=2) / total
    chance = (drawn.sum(axis=2) * drawn.sum(axis=1)).sum(axis=1) / total**2
    told: np.ndarray = (agreed - chance)[chance < 1] / (1 - chance)[chance < 1]
    return told


def sensitivity_and_specificity(pairs: Sequence[tuple[bool, bool]], clusters: Sequence[str], failed: int = 0) -> tuple[Rate, Rate]:
    """The true positive and the true negative rate of the second of each pair, the first being the truth."""
    rates = []
    for truth in (True, False):
        of_truth = [
            (said == truth, cluster) for (true, said), cluster in zip(pairs, clusters, strict=True) if true == truth
        ]
        rates.append(rate([hit for hit, _ in of_truth], [cluster for _, cluster in of_truth], failed))
    return rates[0], rates[1]
