"""Cohen's kappa, sensitivity and specificity against values computed by hand."""

from __future__ import annotations

import random

import pytest

from vlm_unlearn.metrics.agreement import cohen_kappa, kappa_rate, sensitivity_and_specificity


def label_pairs(both_yes: int, first_only: int, second_only: int, both_no: int) -> list[tuple[str, str]]:
    return [("y", "y")] * both_yes + [("y", "n")] * first_only + [("n", "y")] * second_only + [("n", "n")] * both_no


def test_cohen_kappa_matches_hand_computation() -> None:
    """20 and 15 of 50 agree: 0.7 observed; chance is 0.5 * 0.6 + 0.5 * 0.4 = 0.5; (0.7 - 0.5) / (1 - 0.5) = 0.4."""
    assert cohen_kappa(label_pairs(20, 5, 10, 15)) == pytest.approx(0.4)
    assert cohen_kappa(label_pairs(10, 0, 0, 10)) == 1.0
    assert cohen_kappa(label_pairs(5, 5, 5, 5)) == pytest.approx(0.0)
    assert cohen_kappa(label_pairs(0, 10, 10, 0)) == -1.0
    assert cohen_kappa(label_pairs(10, 0, 0, 0)) is None
    assert cohen_kappa([]) is None
    three_labels = [("a", "a"), ("b", "b"), ("c", "c"), ("a", "b")]
    assert cohen_kappa(three_labels) == pytest.approx((0.75 - (2 * 1 + 1 * 2 + 1 * 1) / 16) / (1 - 5 / 16))


@pytest.mark.slow
def test_kappa_rate_interval_covers_the_true_kappa() -> None:
    """The second grader copies 80 % of the labels: kappa is 0.6. The interval covers it in most of 200 studies."""
    rng = random.Random(1)
    covered = 0
    for _ in range(200):
        truth = [rng.random() < 0.5 for _ in range(120)]
        pairs = [(str(label), str(label if rng.random() < 0.8 else not label)) for label in truth]
        kappa = kappa_rate(pairs, [str(number) for number in range(120)])
        covered += bool(kappa.low is not None and kappa.high is not None and kappa.low <= 0.6 <= kappa.high)
    assert covered >= 182  # 95 % of 200 is 190; at 94 % coverage, fewer than 182 happen once in a thousand runs


def test_kappa_rate_copies_within_a_cluster_leave_the_interval_unchanged() -> None:
    pairs = label_pairs(20, 5, 10, 15)
    random.Random(0).shuffle(pairs)
    single = kappa_rate(pairs, [str(number) for number in range(50)])
    copied = kappa_rate(pairs * 4, [str(number % 50) for number in range(200)])
    assert (single.value, single.n) == (pytest.approx(0.4), 50)
    assert (copied.value, copied.n) == (pytest.approx(0.4), 200)
    width_single, width_copied = (kappa.high - kappa.low for kappa in (single, copied))  # type: ignore[operator]
    assert width_copied == pytest.approx(width_single, abs=0.06)


def test_kappa_rate_full_agreement_on_few_answers_has_an_interval() -> None:
    """10 of 10 agree, half and half: up to 25.9 % might not (the rule of three), which is 0.26 / (1 - 0.5) of kappa."""
    kappa = kappa_rate(label_pairs(5, 0, 0, 5), [str(number) for number in range(10)])
    assert (kappa.value, kappa.high) == (1.0, 1.0)
    assert kappa.low == pytest.approx(1 - 0.2589 / 0.5, abs=1e-3)


def test_sensitivity_and_specificity_match_hand_computation() -> None:
    pairs = [(True, True)] * 8 + [(True, False)] * 2 + [(False, False)] * 27 + [(False, True)] * 3
    sensitivity, specificity = sensitivity_and_specificity(pairs, [str(number) for number in range(40)], failed=4)
    assert (sensitivity.value, sensitivity.n, sensitivity.failed) == (0.8, 10, 4)
    assert (specificity.value, specificity.n) == (0.9, 30)
    undefined, _ = sensitivity_and_specificity([(False, True)], ["a"])
    assert undefined.value is None
