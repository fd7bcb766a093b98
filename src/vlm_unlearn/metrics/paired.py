"""Two models on the same prompts: the difference of their rates, its 95 % interval, and whether it could be chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import bdtr

from vlm_unlearn.metrics.rates import rule_of_three
from vlm_unlearn.records import PairedTest

RESAMPLES = 10_000
CHUNK = 1_000_000  # numbers that are drawn at once, at most
Numbers = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class PairedDifference:
    """What changed from one model to the other, over pairs of outcomes."""

    value: float  # the second's mean less the first's
    low: float
    high: float
    p: float  # two-sided, of a difference at least as large where both models are alike
    test: PairedTest
    n: int  # pairs


def paired_difference(base: Sequence[float], model: Sequence[float], clusters: Sequence[str]) -> PairedDifference:
    """Compares outcomes between 0 and 1, pair by pair, always with the same random numbers.

    The interval is a paired bootstrap over clusters. The test is McNemar's where all outcomes are hits and no cluster has two
    pairs, else a permutation test that swaps the two models within whole clusters.

    Args:
        base: the first model's outcomes.
        model: the second's, of the same answers or questions in the same order.
        clusters: what each pair's errors have in common with others', such as the question; whole clusters are drawn.

    Raises:
        ValueError: there are no pairs, or the three differ in length.
    """
    if not len(base) == len(model) == len(clusters) or len(base) == 0:
        raise ValueError("paired outcomes come one a pair, at least one")
    changes = np.asarray(model, dtype=np.float64) - np.asarray(base, dtype=np.float64)
    groups = np.unique(np.asarray(clusters), return_inverse=True)[1]
    sizes: Numbers = np.bincount(groups).astype(np.float64)
    sums: Numbers = np.bincount(groups, weights=changes).astype(np.float64)
    order = np.lexsort((sizes, sums))  # what is drawn must not hang on the order of a file
    sums, sizes = sums[order], sizes[order]
    low, high = _bootstrap(sums, sizes)
    value = float(sums.sum() / len(changes))
    hits_only = all(outcome in (0, 1) for outcome in (*base, *model))
    test: PairedTest = "mcnemar" if hits_only and len(sizes) == len(changes) else "permutation"
    p = mcnemar(int((changes > 0).sum()), int((changes < 0).sum())) if test == "mcnemar" else _permutation(sums)
    return PairedDifference(value, min(low, value), max(high, value), p, test, len(changes))


def mcnemar(gained: int, lost: int) -> float:
    """The p-value of McNemar's test (McNemar 1947), exact and two-sided, from the pairs in which only one of the two is a hit.

    If both models are alike, each such pair falls to either with probability 1/2, so the smaller count is binomial.
    """
    discordant = gained + lost
    return min(1.0, 2 * float(bdtr(min(gained, lost), discordant, 0.5))) if discordant else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for all of them being looked at (Holm 1979), in the same order.

    The smallest of m is multiplied by m, the next by m - 1, and so on; none ends below one that was smaller.
    """
    adjusted = [1.0] * len(p_values)
    largest = 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def _bootstrap(sums: Numbers, sizes: Numbers) -> tuple[float, float]:
    """The percentile interval (Efron 1979) of the mean change, where whole clusters are drawn with replacement.

    Where all clusters changed alike, no resample could differ, and the interval would have no width. Then up to the rule of
    three's share of groups may have changed otherwise, all the way to -1 or 1.

    Args:
        sums: of each cluster's changes.
        sizes: pairs of each cluster.
    """
    count = len(sums)
    mean = float(sums.sum() / sizes.sum())
    if np.abs(sums - mean * sizes).max() < 1e-9:
        unseen = rule_of_three(count)
        return mean - unseen * (1 + mean), mean + unseen * (1 - mean)
    generator = np.random.default_rng(0)
    rows = max(1, CHUNK // count)
    drawn = []
    for start in range(0, RESAMPLES, rows):
        chosen = generator.integers(0, count, size=(min(rows, RESAMPLES - start), count), dtype=np.uint32)
        pairs = sizes[chosen].sum(axis=1) if sizes.min() != sizes.max() else sizes.sum()
        drawn.append(sums[chosen].sum(axis=1) / pairs)
    low, high = np.quantile(np.concatenate(drawn), (0.025, 0.975))
    return float(low), float(high)


def _permutation(sums: Numbers) -> float:
    """The two-sided p-value of the total change, where the two models may be swapped in each cluster (Fisher 1935).

    All ways to swap are counted where they are fewer than the resamples; else so many are drawn, and the observed one counts
    as one of them (Phipson and Smyth 2010).
    """
    moved = np.abs(sums[np.abs(sums) > 1e-12])
    moved.sort()
    observed = abs(float(sums.sum())) - 1e-9
    if 2 ** len(moved) <= RESAMPLES:
        ways = np.arange(2 ** len(moved))[:, None] >> np.arange(len(moved)) & 1
        return float((np.abs((2.0 * ways - 1) @ moved) >= observed).mean())
    generator = np.random.default_rng(0)
    rows = max(1, CHUNK // len(moved))
    reached = 0
    for start in range(0, RESAMPLES, rows):
        drawn = generator.integers(0, 256, size=(min(rows, RESAMPLES - start), -(-len(moved) // 8)), dtype=np.uint8)
        swapped = np.unpackbits(drawn, axis=1)[:, : len(moved)].astype(np.float64)
        reached += int((np.abs(2 * (swapped @ moved) - moved.sum()) >= observed).sum())
    return (reached + 1) / (RESAMPLES + 1)
