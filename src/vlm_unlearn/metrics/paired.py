"""Paired comparison of two models on the same prompts: the difference of their rates, its interval and its p-value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import bdtr

from vlm_unlearn.metrics.rates import rule_of_three
from vlm_unlearn.records import PairedTest

RESAMPLES = 10_000
CHUNK = 1_000_000  # random numbers drawn at once, at most
Numbers = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class PairedDifference:
    """The difference between two models over pairs of outcomes, with its 95 % interval and p-value."""

    value: float  # mean outcome of the model minus mean outcome of the base
    low: float
    high: float
    p: float  # two-sided: probability of a difference at least as large if the two models are alike
    test: PairedTest
    n: int  # number of pairs


def paired_difference(base: Sequence[float], model: Sequence[float], clusters: Sequence[str]) -> PairedDifference:
    """Compares the outcomes of two models, which are numbers from 0 to 1, pair by pair. The random seed is fixed.

    The interval is a paired percentile bootstrap over clusters. The test is McNemar's if all outcomes are 0 or 1 and
    every cluster has a single pair. Otherwise it is a permutation test that swaps the two models in entire clusters.

    Args:
        base: The outcomes of the first model.
        model: The outcomes of the second model, for the same answers or questions in the same order.
        clusters: The cluster of each pair: pairs whose errors are correlated, such as those of one question, share a
            cluster. Clusters are resampled as units.

    Raises:
        ValueError: There are no pairs, or the three sequences differ in length.
    """
    if not len(base) == len(model) == len(clusters) or len(base) == 0:
        raise ValueError("base, model and clusters need one entry per pair, and at least one pair")
    changes = np.asarray(model, dtype=np.float64) - np.asarray(base, dtype=np.float64)
    groups = np.unique(np.asarray(clusters), return_inverse=True)[1]
    order = np.lexsort((changes, groups))  # makes the sums independent of the order of the pairs
    changes, groups = changes[order], groups[order]
    sizes: Numbers = np.bincount(groups).astype(np.float64)
    sums: Numbers = np.bincount(groups, weights=changes).astype(np.float64)
    order = np.lexsort((sizes, sums))  # makes the resamples independent of the order of the pairs
    sums, sizes = sums[order], sizes[order]
    low, high = _bootstrap(sums, sizes)
    value = float(sums.sum() / len(changes))
    hits_only = all(outcome in (0, 1) for outcome in (*base, *model))
    test: PairedTest = "mcnemar" if hits_only and len(sizes) == len(changes) else "permutation"
    p = mcnemar(int((changes > 0).sum()), int((changes < 0).sum())) if test == "mcnemar" else _permutation(sums)
    return PairedDifference(value, min(low, value), max(high, value), p, test, len(changes))


def mcnemar(gained: int, lost: int) -> float:
    """Returns the exact two-sided p-value of McNemar's test (McNemar 1947).

    Only discordant pairs count, in which exactly one of the two models has a hit. If both models are alike, each of
    them is equally likely to have it, so the smaller count is binomial with probability 1/2.

    Args:
        gained: Pairs in which only the second model has a hit.
        lost: Pairs in which only the first model has a hit.
    """
    discordant = gained + lost
    return min(1.0, 2 * float(bdtr(min(gained, lost), discordant, 0.5))) if discordant else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns the p-values adjusted for multiple comparisons (Holm 1979), in the same order.

    The smallest of m p-values is multiplied by m, the next by m - 1, and so on. No adjusted value is below the adjusted
    value of a smaller p-value, and none is above 1.
    """
    adjusted = [1.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def _bootstrap(sums: Numbers, sizes: Numbers) -> tuple[float, float]:
    """Returns the 95 % percentile interval (Efron 1979) of the mean change, with entire clusters resampled.

    If all clusters changed alike, every resample would give the same mean and the interval would have no width. The
    interval then allows for unobserved changes: the share of clusters that the rule of three gives may have changed to
    -1 or to 1.

    Args:
        sums: The sum of the changes in each cluster [C].
        sizes: The number of pairs in each cluster [C].
    """
    count = len(sums)
    mean = float(sums.sum() / sizes.sum())
    if np.abs(sums - mean * sizes).max() < 1e-9:
        unobserved = rule_of_three(count)
        return mean - unobserved * (1 + mean), mean + unobserved * (1 - mean)
    generator = np.random.default_rng(0)
    rows = max(1, CHUNK // count)
    means = []
    for start in range(0, RESAMPLES, rows):
        sampled = generator.integers(0, count, size=(min(rows, RESAMPLES - start), count), dtype=np.uint32)
        pairs = sizes[sampled].sum(axis=1) if sizes.min() != sizes.max() else sizes.sum()
        means.append(sums[sampled].sum(axis=1) / pairs)
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return float(low), float(high)


def _permutation(sums: Numbers) -> float:
    """Returns the two-sided p-value of the total change under swaps of the two models within clusters (Fisher 1935).

    All swaps are enumerated if there are no more than `RESAMPLES` of them. Otherwise `RESAMPLES` random swaps are
    drawn, and the observed one is counted in addition (Phipson and Smyth 2010).

    Args:
        sums: The sum of the changes in each cluster [C].
    """
    changes = np.abs(sums[np.abs(sums) > 1e-12])
    changes.sort()
    observed = abs(float(sums.sum())) - 1e-9
    if 2 ** len(changes) <= RESAMPLES:
        swaps = np.arange(2 ** len(changes))[:, None] >> np.arange(len(changes)) & 1
        return float((np.abs((2.0 * swaps - 1) @ changes) >= observed).mean())
    generator = np.random.default_rng(0)
    rows = max(1, CHUNK // len(changes))
    at_least_observed = 0
    for start in range(0, RESAMPLES, rows):
        random_bytes = generator.integers(
            0, 256, size=(min(rows, RESAMPLES - start), -(-len(changes) // 8)), dtype=np.uint8
        )
        swapped = np.unpackbits(random_bytes, axis=1)[:, : len(changes)].astype(np.float64)
        at_least_observed += int((np.abs(2 * (swapped @ changes) - changes.sum()) >= observed).sum())
    return (at_least_observed + 1) / (RESAMPLES + 1)
