"""Agreement between two graders: Cohen's kappa, sensitivity and specificity."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from vlm_unlearn.metrics.rates import rate, rule_of_three
from vlm_unlearn.records import Kappa, Rate

RESAMPLES, CHUNK = 2000, 100  # bootstrap resamples in total, and per vectorized step


def cohen_kappa(pairs: Sequence[tuple[str, str]]) -> float | None:
    """Returns Cohen's kappa (Cohen 1960): the agreement beyond what the two label distributions give by chance.

    Args:
        pairs: The labels that the two graders gave to each answer.

    Returns:
        1 for full agreement and 0 for chance agreement. None if there are no pairs, or if both graders gave the same
        single label to every answer: kappa is then undefined.
    """
    n = len(pairs)
    if n == 0:
        return None
    observed, chance = sum(a == b for a, b in pairs) / n, _chance_agreement(pairs)
    return None if chance == 1 else (observed - chance) / (1 - chance)


def _chance_agreement(pairs: Sequence[tuple[str, str]]) -> float:
    """Returns the agreement expected if the two graders labeled independently, each with its own label frequencies."""
    counts_a, counts_b = Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    return sum(counts_a[label] * counts_b[label] for label in counts_a) / len(pairs) ** 2


def kappa_rate(pairs: Sequence[tuple[str, str]], clusters: Sequence[str], failed: int = 0) -> Kappa:
    """Returns kappa with a 95 % percentile interval from a cluster bootstrap (Efron & Tibshirani 1993, chapter 13).

    Resamples in which kappa is undefined are excluded. `low` may be below 0.

    Args:
        pairs: The labels that the two graders gave to each answer.
        clusters: The cluster of each pair, such as its question. Clusters are resampled as units.
        failed: Answers that at least one grader failed to grade. They are only counted.
    """
    value = cohen_kappa(pairs)
    if value is None:
        return Kappa(value=None, low=None, high=None, n=len(pairs), failed=failed)
    labels = sorted({label for pair in pairs for label in pair})
    label_index = {label: number for number, label in enumerate(labels)}
    cluster_index = {name: number for number, name in enumerate(sorted(set(clusters)))}
    tables = np.zeros((len(cluster_index), len(labels), len(labels)))  # a contingency table per cluster
    for (a, b), cluster in zip(pairs, clusters, strict=True):
        tables[cluster_index[cluster], label_index[a], label_index[b]] += 1
    rng = np.random.default_rng(0)
    kappas = np.concatenate([_resampled_kappas(rng, tables) for _ in range(RESAMPLES // CHUNK)])
    low, high = np.quantile(kappas, [0.025, 0.975])
    if high - low < 1e-9:  # no resample differs, so the rule of three bounds the unobserved disagreements
        low = max(-1.0, value - rule_of_three(len(cluster_index)) / (1 - _chance_agreement(pairs)))
    return Kappa(value=value, low=min(float(low), value), high=max(float(high), value), n=len(pairs), failed=failed)


def _resampled_kappas(rng: np.random.Generator, tables: np.ndarray) -> np.ndarray:
    """Returns the kappas of one chunk of resamples, without the undefined ones.

    Args:
        tables: One contingency table per cluster [C, L, L].
    """
    weights = rng.multinomial(len(tables), np.full(len(tables), 1 / len(tables)), size=CHUNK)
    resampled = np.einsum("rc,cij->rij", weights.astype(float), tables)
    total = resampled.sum(axis=(1, 2))
    observed = np.trace(resampled, axis1=1, axis2=2) / total
    chance = (resampled.sum(axis=2) * resampled.sum(axis=1)).sum(axis=1) / total**2
    kappas: np.ndarray = (observed - chance)[chance < 1] / (1 - chance)[chance < 1]
    return kappas


def sensitivity_and_specificity(
    pairs: Sequence[tuple[bool, bool]], clusters: Sequence[str], failed: int = 0
) -> tuple[Rate, Rate]:
    """Returns the true positive rate and the true negative rate of a grader, with their intervals.

    Args:
        pairs: The reference grade and the grader's grade of each answer.
        clusters: The cluster of each pair, such as its question.
        failed: Answers that at least one of the two failed to grade. They are only counted.
    """
    rates = []
    for truth in (True, False):
        hits = [
            (grade == truth, cluster)
            for (reference, grade), cluster in zip(pairs, clusters, strict=True)
            if reference == truth
        ]
        rates.append(rate([hit for hit, _ in hits], [cluster for _, cluster in hits], failed))
    return rates[0], rates[1]
