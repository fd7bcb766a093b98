"""Paired comparisons, against values derived by hand and under a true null hypothesis."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest

from vlm_unlearn.metrics.paired import holm, mcnemar, paired_difference

Draw = Callable[[np.random.Generator], tuple[list[float], list[float], list[str]]]


def own(count: int) -> list[str]:
    return [str(i) for i in range(count)]


def test_mcnemar_by_hand() -> None:
    """One of nine discordant pairs gained: 2 * (C(9,0) + C(9,1)) / 2^9 = 20 / 512. Five of ten: more than all there is."""
    assert mcnemar(1, 8) == mcnemar(8, 1) == pytest.approx(20 / 512)
    assert mcnemar(5, 5) == 1.0
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(0, 1) == 1.0
    assert 0 < mcnemar(0, 1000) < 1e-300


def test_holm_by_hand() -> None:
    """0.01 * 4, 0.02 * 3, 0.03 * 2 and 0.5 * 1, none below a smaller one's."""
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([0.04, 0.03]) == pytest.approx([0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_single_pairs_of_hits() -> None:
    """Eight of ten questions lost, none gained: McNemar's p is 2 / 2^8."""
    found = paired_difference([1.0] * 10, [0.0] * 8 + [1.0] * 2, own(10))
    assert (found.value, found.n, found.test) == (-0.8, 10, "mcnemar")
    assert found.p == pytest.approx(2 / 256)
    assert -1 <= found.low < -0.8 < found.high < 0


def test_clusters_are_swapped_whole() -> None:
    """Three questions with two answers each, lost by 2, 2 and 1: of 8 ways to swap, 2 reach a total of 5. As pairs, p would be 2/2^5."""
    base, model = [1.0] * 6, [0.0] * 5 + [1.0]
    found = paired_difference(base, model, ["a", "a", "b", "b", "c", "c"])
    assert (found.test, found.p) == ("permutation", 2 / 8)
    assert found.value == pytest.approx(-5 / 6)


def test_scores_are_permuted() -> None:
    """Changes of 0.1, 0.2 and 0.4 can total 0.7, 0.5, 0.3, 0.1 and their negatives: 8 of 8 reach 0.1, 6 of 8 reach 0.3."""
    assert paired_difference([0.0, 0.0, 0.4], [0.1, 0.2, 0.0], own(3)).p == 1.0
    found = paired_difference([0.0, 0.2, 0.0], [0.1, 0.0, 0.4], own(3))
    assert (found.p, found.test) == (6 / 8, "permutation")
    assert found.value == pytest.approx(0.1)


def test_the_bootstrap_is_the_binomials() -> None:
    """50 of 100 questions gained: the resampled share is binomial, with a standard error of 0.05."""
    found = paired_difference([0.0] * 100, [1.0] * 50 + [0.0] * 50, own(100))
    assert (found.low, found.high) == (pytest.approx(0.40, abs=0.011), pytest.approx(0.60, abs=0.011))


def test_clusters_widen_the_interval() -> None:
    model = [1.0] * 30 + [0.0] * 70
    alone = paired_difference([0.0] * 100, model, own(100))
    clustered = paired_difference([0.0] * 100, model, [str(i // 10) for i in range(100)])
    assert clustered.value == alone.value
    assert clustered.high - clustered.low > 2 * (alone.high - alone.low)


def test_no_change_at_all_still_has_an_interval() -> None:
    """Nothing changed in 40 questions: up to 7.2 % of them may have, either way. All were lost: up to 7.2 % may even be gained."""
    same = paired_difference([0.0] * 40, [0.0] * 40, own(40))
    assert (same.value, same.p) == (0.0, 1.0)
    assert (same.low, same.high) == (pytest.approx(-0.0722, abs=1e-4), pytest.approx(0.0722, abs=1e-4))
    gone = paired_difference([1.0] * 40, [0.0] * 40, own(40))
    assert (gone.low, gone.high) == (-1.0, pytest.approx(-1 + 2 * 0.0722, abs=1e-4))
    assert paired_difference([0.5], [0.5], ["a"]).low < 0 < paired_difference([0.5], [0.5], ["a"]).high


def test_the_order_of_pairs_changes_nothing() -> None:
    rng = np.random.default_rng(0)
    base, model, clusters = rng.random(300), rng.random(300), rng.integers(0, 90, 300).astype(str)
    turned = rng.permutation(300)
    one = paired_difference(base.tolist(), model.tolist(), clusters.tolist())
    other = paired_difference(base[turned].tolist(), model[turned].tolist(), clusters[turned].tolist())
    assert (one.low, one.high, one.value) == pytest.approx((other.low, other.high, other.value), rel=1e-9)
    assert one.p == other.p


def test_what_has_no_pairs_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        paired_difference([], [], [])
    with pytest.raises(ValueError, match="one a pair"):
        paired_difference([1.0], [1.0, 0.0], ["a"])


def test_two_thousand_groups_take_less_than_a_second() -> None:
    rng = np.random.default_rng(0)
    base, model = rng.random(2000).tolist(), rng.random(2000).tolist()
    started = time.process_time()
    paired_difference(base, model, own(2000))
    assert time.process_time() - started < 1.0


def single_hits(rng: np.random.Generator) -> tuple[list[float], list[float], list[str]]:
    level = rng.random(200)
    return (rng.random(200) < level).astype(float).tolist(), (rng.random(200) < level).astype(float).tolist(), own(200)


def clustered_hits(rng: np.random.Generator) -> tuple[list[float], list[float], list[str]]:
    """80 questions of 4 answers; each model finds its own questions hard."""
    levels = rng.beta(1, 2, (2, 80))
    base, model = (rng.random((2, 80, 4)) < levels[:, :, None]).astype(float).reshape(2, 320)
    return base.tolist(), model.tolist(), np.repeat(np.arange(80), 4).astype(str).tolist()


def single_scores(rng: np.random.Generator) -> tuple[list[float], list[float], list[str]]:
    level = rng.random(80)
    base, model = np.clip(level + rng.normal(0, 0.2, (2, 80)), 0, 1)
    return base.tolist(), model.tolist(), own(80)


@pytest.mark.parametrize("draw", [single_hits, clustered_hits, single_scores])
def test_alike_models_differ_significantly_in_one_case_of_twenty(draw: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the interval holds the true difference, 0, in nineteen."""
    monkeypatch.setattr("vlm_unlearn.metrics.paired.RESAMPLES", 1000)
    rng = np.random.default_rng(1)
    found = [paired_difference(*draw(rng)) for _ in range(1000)]
    assert 0.02 <= sum(one.p < 0.05 for one in found) / 1000 <= 0.07
    assert 0.92 <= sum(one.low <= 0 <= one.high for one in found) / 1000 <= 0.98


def test_pairs_in_clusters_would_mislead_mcnemar() -> None:
    """What the permutation test is there for: as if all answers were independent, one null in ten or more is called significant."""
    rng = np.random.default_rng(1)
    wrong = 0
    for _ in range(400):
        base, model, _ = clustered_hits(rng)
        changes = np.asarray(model) - np.asarray(base)
        wrong += mcnemar(int((changes > 0).sum()), int((changes < 0).sum())) < 0.05
    assert wrong / 400 > 0.1


def test_a_change_that_is_there_is_found() -> None:
    rng = np.random.default_rng(0)
    base, model = rng.random(200) < 0.5, rng.random(200) < 0.2
    found = paired_difference(base.astype(float).tolist(), model.astype(float).tolist(), own(200))
    assert found.p < 1e-3
    assert found.low < -0.3 < found.high < 0
