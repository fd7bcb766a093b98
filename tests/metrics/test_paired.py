"""Paired comparisons, against values computed by hand and under a true null hypothesis."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest

from vlm_unlearn.metrics.paired import holm, mcnemar, paired_difference

Draw = Callable[[np.random.Generator], tuple[list[float], list[float], list[str]]]


def single_clusters(count: int) -> list[str]:
    """A cluster per pair."""
    return [str(i) for i in range(count)]


def test_mcnemar_matches_hand_computation() -> None:
    """One of nine discordant pairs gained: 2 * (C(9,0) + C(9,1)) / 2^9 = 20 / 512. Five of ten: capped at 1."""
    assert mcnemar(1, 8) == mcnemar(8, 1) == pytest.approx(20 / 512)
    assert mcnemar(5, 5) == 1.0
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(0, 1) == 1.0
    assert 0 < mcnemar(0, 1000) < 1e-300


def test_holm_matches_hand_computation() -> None:
    """0.01 * 4, 0.02 * 3, 0.03 * 2 and 0.5 * 1. None is below the adjusted value of a smaller p-value."""
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([0.04, 0.03]) == pytest.approx([0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_paired_difference_single_hits_uses_mcnemar() -> None:
    """Eight of ten questions lost, none gained: McNemar's p is 2 / 2^8."""
    difference = paired_difference([1.0] * 10, [0.0] * 8 + [1.0] * 2, single_clusters(10))
    assert (difference.value, difference.n, difference.test) == (-0.8, 10, "mcnemar")
    assert difference.p == pytest.approx(2 / 256)
    assert -1 <= difference.low < -0.8 < difference.high < 0


def test_paired_difference_permutation_swaps_entire_clusters() -> None:
    """Three questions lose 2, 2 and 1 of two answers: 2 of 8 swaps reach a total of 5. As pairs, p would be 2/2^5."""
    base, model = [1.0] * 6, [0.0] * 5 + [1.0]
    difference = paired_difference(base, model, ["a", "a", "b", "b", "c", "c"])
    assert (difference.test, difference.p) == ("permutation", 2 / 8)
    assert difference.value == pytest.approx(-5 / 6)


def test_paired_difference_scores_use_the_permutation_test() -> None:
    """Changes of 0.1, 0.2 and 0.4 total 0.7, 0.5, 0.3, 0.1 or their negatives: 8 of 8 reach 0.1, 6 of 8 reach 0.3."""
    assert paired_difference([0.0, 0.0, 0.4], [0.1, 0.2, 0.0], single_clusters(3)).p == 1.0
    difference = paired_difference([0.0, 0.2, 0.0], [0.1, 0.0, 0.4], single_clusters(3))
    assert (difference.p, difference.test) == (6 / 8, "permutation")
    assert difference.value == pytest.approx(0.1)


def test_paired_difference_bootstrap_matches_the_binomial() -> None:
    """50 of 100 questions gained: the resampled share is binomial, with a standard error of 0.05."""
    difference = paired_difference([0.0] * 100, [1.0] * 50 + [0.0] * 50, single_clusters(100))
    assert (difference.low, difference.high) == (pytest.approx(0.40, abs=0.011), pytest.approx(0.60, abs=0.011))


def test_paired_difference_clusters_widen_the_interval() -> None:
    model = [1.0] * 30 + [0.0] * 70
    single = paired_difference([0.0] * 100, model, single_clusters(100))
    clustered = paired_difference([0.0] * 100, model, [str(i // 10) for i in range(100)])
    assert clustered.value == single.value
    assert clustered.high - clustered.low > 2 * (single.high - single.low)


def test_paired_difference_without_changes_has_an_interval() -> None:
    """No change in 40 questions allows for 7.2 % of changes either way. If all are lost, 7.2 % may still be gained."""
    same = paired_difference([0.0] * 40, [0.0] * 40, single_clusters(40))
    assert (same.value, same.p) == (0.0, 1.0)
    assert (same.low, same.high) == (pytest.approx(-0.0722, abs=1e-4), pytest.approx(0.0722, abs=1e-4))
    lost = paired_difference([1.0] * 40, [0.0] * 40, single_clusters(40))
    assert (lost.low, lost.high) == (-1.0, pytest.approx(-1 + 2 * 0.0722, abs=1e-4))
    assert paired_difference([0.5], [0.5], ["a"]).low < 0 < paired_difference([0.5], [0.5], ["a"]).high


def test_paired_difference_does_not_depend_on_the_order_of_pairs() -> None:
    rng = np.random.default_rng(0)
    base, model, clusters = rng.random(300), rng.random(300), rng.integers(0, 90, 300).astype(str)
    order = rng.permutation(300)
    sorted_pairs = paired_difference(base.tolist(), model.tolist(), clusters.tolist())
    shuffled_pairs = paired_difference(base[order].tolist(), model[order].tolist(), clusters[order].tolist())
    expected = (shuffled_pairs.low, shuffled_pairs.high, shuffled_pairs.value)
    assert (sorted_pairs.low, sorted_pairs.high, sorted_pairs.value) == pytest.approx(expected, rel=1e-9)
    assert sorted_pairs.p == shuffled_pairs.p


def test_paired_difference_invalid_lengths_raise() -> None:
    with pytest.raises(ValueError, match="pair"):
        paired_difference([], [], [])
    with pytest.raises(ValueError, match="pair"):
        paired_difference([1.0], [1.0, 0.0], ["a"])


def test_paired_difference_of_two_thousand_clusters_takes_less_than_a_second() -> None:
    rng = np.random.default_rng(0)
    base, model = rng.random(2000).tolist(), rng.random(2000).tolist()
    started = time.process_time()
    paired_difference(base, model, single_clusters(2000))
    assert time.process_time() - started < 1.0


def single_hits(rng: np.random.Generator) -> tuple[list[float], list[float], list[str]]:
    level = rng.random(200)
    return (
        (rng.random(200) < level).astype(float).tolist(),
        (rng.random(200) < level).astype(float).tolist(),
        single_clusters(200),
    )


def clustered_hits(rng: np.random.Generator) -> tuple[list[float], list[float], list[str]]:
    """80 questions with 4 answers each. The difficulty of a question differs between the models."""
    levels = rng.beta(1, 2, (2, 80))
    base, model = (rng.random((2, 80, 4)) < levels[:, :, None]).astype(float).reshape(2, 320)
    return base.tolist(), model.tolist(), np.repeat(np.arange(80), 4).astype(str).tolist()


def single_scores(rng: np.random.Generator) -> tuple[list[float], list[float], list[str]]:
    level = rng.random(80)
    base, model = np.clip(level + rng.normal(0, 0.2, (2, 80)), 0, 1)
    return base.tolist(), model.tolist(), single_clusters(80)


@pytest.mark.slow
@pytest.mark.parametrize("draw", [single_hits, clustered_hits, single_scores])
def test_paired_difference_of_equal_models_is_significant_in_five_percent(
    draw: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The 95 % interval covers the true difference, 0, in about 95 % of 1,000 draws."""
    monkeypatch.setattr("vlm_unlearn.metrics.paired.RESAMPLES", 1000)
    rng = np.random.default_rng(1)
    differences = [paired_difference(*draw(rng)) for _ in range(1000)]
    assert 0.02 <= sum(difference.p < 0.05 for difference in differences) / 1000 <= 0.07
    assert 0.92 <= sum(difference.low <= 0 <= difference.high for difference in differences) / 1000 <= 0.98


def test_mcnemar_on_clustered_pairs_is_significant_too_often() -> None:
    """McNemar's test assumes independent pairs and rejects more than 10 % of true nulls. Hence the permutation test."""
    rng = np.random.default_rng(1)
    rejected = 0
    for _ in range(400):
        base, model, _ = clustered_hits(rng)
        changes = np.asarray(model) - np.asarray(base)
        rejected += mcnemar(int((changes > 0).sum()), int((changes < 0).sum())) < 0.05
    assert rejected / 400 > 0.1


def test_paired_difference_detects_a_real_change() -> None:
    rng = np.random.default_rng(0)
    base, model = rng.random(200) < 0.5, rng.random(200) < 0.2
    difference = paired_difference(base.astype(float).tolist(), model.astype(float).tolist(), single_clusters(200))
    assert difference.p < 1e-3
    assert difference.low < -0.3 < difference.high < 0
