"""Cohen's kappa and the rates beside it, by hand."""

from __future__ import annotations

import random

import pytest

from vlm_unlearn.metrics.agreement import cohen_kappa, sensitivity_and_specificity, kappa_rate


def table(both_yes: int, first_only: int, second_only: int, both_no: int) -> list[tuple[str, str]]:
    return [("y", "y")] * both_yes + [("y", "n")] * first_only + [("n", "y")] * second_only + [("n", "n")] * both_no


def test_kappa_by_hand() -> None:
    """20 and 15 of 50 agree: 0.7 observed; chance is 0.5 * 0.6 + 0.5 * 0.4 = 0.5; (0.7 - 0.5) / (1 - 0.5) = 0.4."""
    assert cohen_kappa(table(20, 5, 10, 15)) == pytest.approx(0.4)
    assert cohen_kappa(table(10, 0, 0, 10)) == 1.0
    assert cohen_kappa(table(5, 5, 5, 5)) == pytest.approx(0.0)
    assert cohen_kappa(table(0, 10, 10, 0)) == -1.0
    assert cohen_kappa(table(10, 0, 0, 0)) is None
    assert cohen_kappa([]) is None
    three = [("a", "a"), ("b", "b"), ("c", "c"), ("a", "b")]
    assert cohen_kappa(three) == pytest.approx((0.75 - (2 * 1 + 1 * 2 + 1 * 1) / 16) / (1 - 5 / 16))


def test_the_interval_holds_kappa() -> None:
    """Two graders who copy a coin 80 % of the time: kappa 0.6; the 95 % interval holds it in most of 200 studies."""
    rng = random.Random(1)
    held = 0
    for _ in range(200):
        truth = [rng.random() < 0.5 for _ in range(120)]
        pairs = [(str(one), str(one if rng.random() < 0.8 else not one)) for one in truth]
        found = kappa_rate(pairs, [str(number) for number in range(120)])
        held += bool(found.low is not None and found.high is not None and found.low <= 0.6 <= found.high)
    assert held >= 182  # 95 % of 200 are 190; below 182 comes once in a thousand at 94 %


def test_clusters_widen_the_interval() -> None:
    pairs = table(20, 5, 10, 15)
    random.Random(0).shuffle(pairs)
    alone = kappa_rate(pairs, [str(number) for number in range(50)])
    grouped = kappa_rate(pairs * 4, [str(number % 50) for number in range(200)])
    assert (alone.value, alone.n) == (pytest.approx(0.4), 50)
    assert grouped.value == pytest.approx(0.4)
    assert grouped.n == 200
    width, narrow = (found.high - found.low for found in (grouped, alone))  # type: ignore[operator]
    assert width == pytest.approx(narrow, abs=0.06)  # four copies of an answer tell no more than one


def test_full_agreement_on_few_answers_is_not_certain() -> None:
    """10 of 10 agree, half and half: up to 25.9 % might not (the rule of three), which is 0.26 / (1 - 0.5) of kappa."""
    found = kappa_rate(table(5, 0, 0, 5), [str(number) for number in range(10)])
    assert (found.value, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(1 - 0.2589 / 0.5, abs=1e-3)


def test_hit_rates_by_hand() -> None:
    pairs = [(True, True)] * 8 + [(True, False)] * 2 + [(False, False)] * 27 + [(False, True)] * 3
    sensitivity, specificity = sensitivity_and_specificity(pairs, [str(number) for number in range(40)], failed=4)
    assert (sensitivity.value, sensitivity.n, sensitivity.failed) == (0.8, 10, 4)
    assert (specificity.value, specificity.n) == (0.9, 30)
    nothing, _ = sensitivity_and_specificity([(False, True)], ["a"])
    assert nothing.value is None
