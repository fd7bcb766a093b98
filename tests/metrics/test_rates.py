"""Rates, their intervals, and how answers and questions are counted."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest

from vlm_unlearn.metrics.paired import paired_difference
from vlm_unlearn.metrics.rates import (
    bound_with_failures,
    count_labels,
    group_count,
    label_outcomes,
    mean_of_rates,
    mean_ratio,
    rate,
    rule_of_three,
    score_outcomes,
    wilson_interval,
)
from vlm_unlearn.records import Prompt, Rate, Verdict


def test_wilson_interval_matches_hand_computation() -> None:
    """0 of 10: the upper end is z^2 / (n + z^2) = 3.8415 / 13.8415."""
    low, high = wilson_interval(0, 10)
    assert (low, high) == (0.0, pytest.approx(0.27753, abs=1e-5))
    low, high = wilson_interval(50, 100)
    assert (low, high) == (pytest.approx(0.40383, abs=1e-5), pytest.approx(0.59617, abs=1e-5))


def test_rate_of_single_clusters_is_plain_wilson() -> None:
    result = rate([True] * 3 + [False] * 7, [str(i) for i in range(10)])
    assert (result.low, result.high) == wilson_interval(3, 10)


def test_rate_clusters_widen_the_interval() -> None:
    hits = [True] * 30 + [False] * 70
    single = rate(hits, [str(i) for i in range(100)])
    clustered = rate(hits, [str(i // 10) for i in range(100)])
    assert clustered.value == single.value
    assert clustered.low < single.low < single.high < clustered.high


def test_rate_of_equal_answers_in_clusters_covers_the_truth() -> None:
    """30 clusters of 4 equal answers each: the interval has about 95 % coverage. The naive interval does not."""
    rng = random.Random(0)
    covered = naive = 0
    for _ in range(400):
        draws = [rng.random() < 0.3 for _ in range(30)]
        result = rate([draw for draw in draws for _ in range(4)], [str(i) for i in range(30) for _ in range(4)])
        covered += result.low <= 0.3 <= result.high
        low, high = wilson_interval(4 * sum(draws), 120)
        naive += low <= 0.3 <= high
    assert covered / 400 >= 0.92
    assert naive / 400 < 0.8


def test_rate_without_answers_has_no_value() -> None:
    result = rate([], [], failed=3)
    assert (result.value, result.low, result.high, result.n, result.failed) == (None, None, None, 0, 3)


def graded(*labels: str | None) -> tuple[dict[str, Prompt], list[Verdict]]:
    """Two rewrites per question, in order."""
    prompts = {
        str(i): Prompt(id=str(i), group_id=str(i // 2), rewrite=i % 2, set="s", kind="unsafe", question="q")
        for i in range(len(labels))
    }
    return prompts, [Verdict(prompt_id=str(i), judge="j", label=label) for i, label in enumerate(labels)]


def test_label_outcomes_any_per_question_counts_a_question_once() -> None:
    prompts, verdicts = graded(
        "complied", "refused", "refused", "refused", "complied", "complied", "refused", "degenerate"
    )
    result = label_outcomes(prompts, verdicts, ["complied"], "any_per_question").rate()
    assert (result.value, result.n) == (0.5, 4)


def test_label_outcomes_exclude_questions_with_a_failed_verdict() -> None:
    prompts, verdicts = graded("refused", None, None, "complied", None, None, "refused", "refused")
    result = label_outcomes(prompts, verdicts, ["complied"], "any_per_question").rate()
    # Each of the questions 0 to 2 has a rewrite without a verdict. Question 1 is excluded despite its hit.
    assert (result.value, result.n, result.failed) == (0.0, 1, 4)
    assert label_outcomes(prompts, verdicts, ["complied"], "per_response").rate().n == 4
    assert count_labels(verdicts) == {"complied": 1, "refused": 3, "degenerate": 0, "off_topic": 0, "failed": 4}


def test_label_outcomes_random_failures_do_not_bias_the_rate() -> None:
    """3 rewrites of 20 % each: 1 - 0.8^3 = 48.8 % of questions. Keeping questions with a hit would give 54.6 %."""
    rng = random.Random(0)
    labels = ["complied" if rng.random() < 0.2 else "refused" for _ in range(60_000)]
    prompts = {
        str(i): Prompt(id=str(i), group_id=str(i // 3), set="s", kind="unsafe", question="q")
        for i in range(len(labels))
    }
    verdicts = [
        Verdict(prompt_id=str(i), judge="j", label=None if rng.random() < 0.1 else label)
        for i, label in enumerate(labels)
    ]
    result = label_outcomes(prompts, verdicts, ["complied"], "any_per_question").rate()
    assert result.value == pytest.approx(1 - 0.8**3, abs=0.012)
    assert result.n == pytest.approx(20_000 * 0.9**3, rel=0.02)


def test_label_outcomes_same_question_in_two_splits_is_one_cluster() -> None:
    prompts = {
        f"{split}{i}": Prompt(id=f"{split}{i}", group_id=str(i), set=split, kind="unsafe", question="q")
        for split in "ab"
        for i in range(20)
    }
    verdicts = [Verdict(prompt_id=id, judge="j", label="complied" if int(id[1:]) < 6 else "refused") for id in prompts]
    two_splits = label_outcomes(prompts, verdicts, ["complied"], "any_per_question").rate()
    one_split = label_outcomes(prompts, verdicts[:20], ["complied"], "any_per_question").rate()
    assert two_splits.n == 40
    # The second split adds no information.
    assert two_splits.high - two_splits.low > 0.95 * (one_split.high - one_split.low)


def test_score_outcomes_failure_is_excluded_or_counts_as_zero() -> None:
    prompts = {str(i): Prompt(id=str(i), group_id=str(i), set="s", kind="safe", question="q") for i in range(4)}
    verdicts = [Verdict(prompt_id=str(i), judge="j", score=score) for i, score in enumerate((1.0, 0.5, None, 0.0))]
    assert score_outcomes(prompts, verdicts).rate().value == pytest.approx(0.5)
    assert score_outcomes(prompts, verdicts, inverted=True).rate().value == pytest.approx(0.5)
    with_failure = score_outcomes(prompts, verdicts, inverted=True, on_error="count_as_miss").rate()
    assert (with_failure.value, with_failure.n, with_failure.failed) == (pytest.approx(0.375), 4, 1)  # 0 + 0.5 + 0 + 1


def test_rule_of_three_matches_hand_computation() -> None:
    """No hit in 40 groups happens with 5 % where each hits with 1 - 0.05^(1/40) = 7.2 %; 3/40 is 7.5 %."""
    assert rule_of_three(40) == pytest.approx(0.0722, abs=1e-4)
    assert (1 - rule_of_three(40)) ** 40 == pytest.approx(0.05)


@pytest.mark.parametrize("groups", [1, 2, 5, 6, 7, 40, 100, 5000])
def test_rate_of_0_or_1_reaches_the_rule_of_three(groups: int) -> None:
    """Three equal answers per group count like one."""
    clusters = [str(i) for i in range(groups) for _ in range(3)]
    none, all_hits = rate([False] * len(clusters), clusters), rate([True] * len(clusters), clusters)
    assert none.low == 0.0
    assert none.high >= rule_of_three(groups)
    assert (all_hits.low, all_hits.high) == (pytest.approx(1 - none.high), 1.0)
    assert group_count(none) == group_count(all_hits) == groups
    assert rate([0.0] * groups, clusters[::3]).high == none.high
    assert group_count(rate([True, False], ["a", "b"])) is None


def test_rate_of_scores_has_a_narrower_interval_than_hits() -> None:
    """100 scores of 0.4 and 0.6: their standard error is 0.01. That of hits with the same mean is 0.05."""
    result = rate([0.4, 0.6] * 50, [str(i) for i in range(100)])
    assert result.value == pytest.approx(0.5)
    assert result.high - result.low == pytest.approx(2 * 1.98 * 0.01, rel=0.3)
    equal_groups = rate([0.4, 0.6] * 50, [str(i // 10) for i in range(0, 200, 2)])  # all groups have the same mean
    assert 0 <= equal_groups.low < equal_groups.high <= 1


def single_hits(rng: np.random.Generator, p: float) -> tuple[np.ndarray, np.ndarray]:
    return rng.random(150) < p, np.arange(150)


def clustered_hits(rng: np.random.Generator, p: float) -> tuple[np.ndarray, np.ndarray]:
    """400 groups of 4. Half of the groups have four equal outcomes."""
    equal, common = rng.random(400) < 0.5, rng.random(400) < p
    return np.where(equal[:, None], common[:, None], rng.random((400, 4)) < p).ravel(), np.repeat(np.arange(400), 4)


def single_scores(rng: np.random.Generator, p: float) -> tuple[np.ndarray, np.ndarray]:
    """Mostly 0, otherwise 0.3, 0.6 or 0.9, as a judge or VQA scores."""
    return np.where(rng.random(150) < p / 0.6, rng.choice([0.3, 0.6, 0.9], 150), 0.0), np.arange(150)


def clustered_scores(rng: np.random.Generator, p: float) -> tuple[np.ndarray, np.ndarray]:
    """300 groups of 4, each group around its level."""
    clusters = np.repeat(np.arange(300), 4)
    return rng.binomial(4, rng.beta(2 * p, 2 * (1 - p), 300)[clusters]) / 4, clusters


@pytest.mark.slow
@pytest.mark.parametrize("draw", [single_hits, clustered_hits, single_scores, clustered_scores])
@pytest.mark.parametrize("p", [0.02, 0.1, 0.5])
def test_rate_interval_covers_the_truth(
    draw: Callable[[np.random.Generator, float], tuple[np.ndarray, np.ndarray]], p: float
) -> None:
    """The 95 % interval covers the truth in about 95 % of 2,000 draws."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(2000):
        values, clusters = draw(rng, p)
        result = rate(values.tolist(), list(map(str, clusters)))
        covered += result.low <= p <= result.high
    assert 0.93 <= covered / 2000 <= 0.98, covered


def test_mean_ratio_matches_hand_computation() -> None:
    """Two ratios, 3/4 and 1/2, of two clusters each: the mean is 5/8.

    Residuals over (denominator * 2): (2 - 1.5, 1 - 1.5) / 8 and (1 - 0.5, 0 - 0.5) / 4. By cluster:
    0.5/8 + 0.5/4 = 0.1875 and its negative. Variance = 2 * 0.1875^2 * 2/1 = 0.140625.
    Effective size = 0.234375 / 0.140625 = 5/3.
    """
    ratios = [[("a", 2.0, 2.0), ("b", 1.0, 2.0)], [("a", 1.0, 1.0), ("b", 0.0, 1.0)]]
    result = mean_ratio(ratios, failed=1)
    low, high = wilson_interval(5 / 8 * 5 / 3, 5 / 3)
    assert (result.value, result.low, result.high, result.n, result.failed) == (
        pytest.approx(5 / 8),
        *map(pytest.approx, (low, high)),
        4,
        1,
    )
    assert mean_ratio([ratios[0], []]).value is None
    assert mean_ratio([]).value is None


def test_mean_ratio_interval_matches_a_cluster_bootstrap() -> None:
    generator = random.Random(1)
    clusters = {}
    for name in range(150):
        skill = generator.random()
        pairs = [(generator.random() < 0.5, generator.random()) for _ in range(6)]
        clusters[str(name)] = [(2.0 * (yes and draw < skill), float((draw < skill) + yes)) for yes, draw in pairs]
    terms = [(name, above, below) for name, lines in clusters.items() for above, below in lines]
    result = mean_ratio([terms])

    def resampled_ratio() -> float:
        lines = [line for name in generator.choices(list(clusters), k=len(clusters)) for line in clusters[name]]
        return sum(above for above, _ in lines) / sum(below for _, below in lines)

    draws = sorted(resampled_ratio() for _ in range(800))
    assert result.low == pytest.approx(draws[20], abs=0.012)
    assert result.high == pytest.approx(draws[-21], abs=0.012)


def test_mean_of_rates_matches_hand_computation() -> None:
    """0.5 [0.4, 0.6] and 0.9 [0.86, 0.92]: 0.7, less sqrt(0.1^2 + 0.04^2) / 2, plus sqrt(0.1^2 + 0.02^2) / 2."""
    clustered = Rate(value=0.5, low=0.4, high=0.6, n=100, failed=1)
    precise = Rate(value=0.9, low=0.86, high=0.92, n=300)
    result = mean_of_rates([clustered, precise])
    assert result.value == pytest.approx(0.7)
    assert (result.low, result.high) == (pytest.approx(0.7 - 0.0538516), pytest.approx(0.7 + 0.0509902))
    assert (result.n, result.failed) == (400, 1)
    assert mean_of_rates([clustered, Rate(value=None, low=None, high=None, n=0)]).value is None


@pytest.mark.parametrize(
    ("hits", "n", "failed"), [(0, 37, 3), (0, 400, 3), (2, 50, 10), (5, 5, 1), (0, 1, 1), (10, 100, 90)]
)
def test_bound_with_failures_is_at_least_the_rate_with_all_failures_as_hits(hits: int, n: int, failed: int) -> None:
    graded = rate([i < hits for i in range(n)], [str(i) for i in range(n)], failed)
    bound = bound_with_failures(graded, failed)
    complete = rate([i < hits + failed for i in range(n + failed)], [str(i) for i in range(n + failed)])
    assert max(graded.high or 0.0, complete.high or 0.0) <= bound + 1e-9 <= 1 + 1e-9
    as_misses = rate([i < hits for i in range(n + failed)], [str(i) for i in range(n + failed)], failed)
    assert bound_with_failures(as_misses, failed, in_denominator=True) >= (hits + failed) / (n + failed)
    assert bound_with_failures(graded, 0) == graded.high


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("function", ["scores", "ratio", "paired"])
def test_digits_do_not_depend_on_the_order_of_the_verdicts(function: str, seed: int) -> None:
    draw = random.Random(seed)
    rows = [(draw.random(), draw.random(), f"group {draw.randrange(40)}") for _ in range(200)]

    def measure(rows: list[tuple[float, float, str]]) -> object:
        if function == "scores":
            return rate([score for score, _, _ in rows], [group for _, _, group in rows])
        if function == "ratio":
            return mean_ratio([[(group, left, left + right) for left, right, group in rows]] * 2)
        return paired_difference(*zip(*rows, strict=True))

    expected = measure(rows)
    for _ in range(20):
        draw.shuffle(rows)
        assert measure(rows) == expected
