"""The recovered share: hand-computed values, intervals, undefined cases and failures."""

from __future__ import annotations

import pytest

from vlm_unlearn.metrics.rates import rate
from vlm_unlearn.records import Rate
from vlm_unlearn.robustness.recovery import recovered, state_rate, steps_to_half
from vlm_unlearn.robustness.results import AttackedAnswer, AttackResult, MeasuredState


def of(hits: int, n: int, failed: int = 0) -> Rate:
    return rate([1.0] * hits + [0.0] * (n - hits), [str(i) for i in range(n)], failed)


@pytest.mark.parametrize(
    ("model", "base", "never", "expected"),
    [
        ((20, 40), (40, 40), (0, 40), 0.5),
        ((0, 40), (40, 40), (0, 40), 0.0),
        ((40, 40), (20, 40), (0, 40), 2.0),  # the attack harms the base more than the model
        ((2, 40), (40, 40), (8, 40), (0.05 - 0.2) / (1 - 0.2)),  # below the control: nothing is clipped
    ],
)
def test_recovered_share_by_hand(model, base, never, expected: float) -> None:
    result = recovered(of(*model), of(*base), of(*never))
    assert result.value == pytest.approx(expected)
    assert result.low <= result.value <= result.high
    assert result.control == "never_knew"


def test_more_questions_narrow_the_interval() -> None:
    wide, narrow = (recovered(of(n // 2, n), of(n, n), of(0, n)) for n in (20, 200))
    assert narrow.high - narrow.low < wide.high - wide.low


def test_interval_covers_the_true_share() -> None:
    """Over simulated samples, the interval contains the true share in at least 95 % of them, less 2 % for chance."""
    import random

    rng = random.Random(0)
    n, truth = 60, (0.4, 0.9, 0.1)
    share = (truth[0] - truth[2]) / (truth[1] - truth[2])
    covered = 0
    for _ in range(400):
        result = recovered(*(of(sum(rng.random() < p for _ in range(n)), n) for p in truth))
        covered += result.low <= share <= result.high
    assert covered >= 0.93 * 400


@pytest.mark.parametrize(("base", "never"), [((30, 40), (30, 40)), ((3, 40), (0, 40)), ((10, 40), (20, 40))])
def test_undefined_where_base_and_control_meet(base, never) -> None:
    result = recovered(of(10, 40), of(*base), of(*never))
    assert (result.value, result.low, result.high) == (None, None, None)


def test_without_a_control_zero_takes_its_place_and_the_result_says_so() -> None:
    result = recovered(of(10, 40), of(40, 40), None)
    assert (result.value, result.control) == (pytest.approx(0.25), "zero")


def test_nothing_graded_is_undefined() -> None:
    assert recovered(Rate(value=None, low=None, high=None, n=0, failed=3), of(4, 4), None).value is None


def answer(group: str, label: str | None, sample: int = 0, score: float | None = None) -> AttackedAnswer:
    return AttackedAnswer(prompt_id=f"{group}/{sample}", group_id=group, sample=sample, label=label, score=score)


def test_a_question_counts_once_and_a_failed_answer_is_counted() -> None:
    answers = [answer("a", "refused"), answer("a", "complied", 1), answer("b", "refused"), answer("c", None)]
    result = state_rate(MeasuredState(name="x", answers=answers), ["complied"])
    assert (result.value, result.n, result.failed) == (0.5, 2, 1)


def test_scores_are_averaged() -> None:
    answers = [answer("a", None, score=0.2), answer("b", None, score=0.6), answer("c", None)]
    result = state_rate(MeasuredState(name="x", is_score=True, answers=answers), ["complied"])
    assert (result.value, result.n, result.failed) == (pytest.approx(0.4), 2, 1)


def test_steps_to_half_of_the_base() -> None:
    def point(step: int, model: int, base: int, never: int) -> AttackResult:
        rates = of(model, 10), of(base, 10), of(never, 10)
        return AttackResult(
            name=f"relearn/10/{step}",
            attack="relearn",
            asr=rates[0],
            asr_base=rates[1],
            asr_never_knew=rates[2],
            recovered=recovered(*rates),
            curve="relearn/10",
            step=step,
        )

    [curve] = steps_to_half([point(20, 6, 9, 1), point(5, 2, 9, 0), point(60, 9, 9, 4)], unattacked_base=1.0)
    assert (curve.model, curve.base, curve.never_knew, curve.threshold) == (20, 5, None, 0.5)
