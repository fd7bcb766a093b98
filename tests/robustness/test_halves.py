"""The two halves of the harmful knowledge have nothing in common."""

from __future__ import annotations

import pytest

from helpers import raises_code
from vlm_unlearn.records import Example, Prompt
from vlm_unlearn.robustness.halves import Halves

EXAMPLES = [
    Example(id=f"{answer}{i}", image=f"{answer}.png", question="?", answer=answer, category=answer[0])
    for answer in ("bomb", "bane", "acid", "toxin", "venom", "poison")
    for i in range(4)
]
PROMPTS = [
    Prompt(id=f"q{i}", group_id=f"q{i}", set="unsafe", kind="unsafe", question="?", reference=answer, category="b")
    for i, answer in enumerate(("bomb", "bane", "acid", "toxin", "venom", "poison"))
]


@pytest.mark.parametrize("key", ["answer", "image", "category"])
@pytest.mark.parametrize("seed", range(5))
def test_no_value_is_in_both_halves(key, seed: int) -> None:
    halves = Halves(key, EXAMPLES, [], seed)
    first, second = ({getattr(e, key) for e in half(EXAMPLES)} for half in (halves.first, halves.second))
    assert first
    assert second
    assert not first & second
    assert len(halves.first(EXAMPLES)) + len(halves.second(EXAMPLES)) == len(EXAMPLES)
    assert abs(len(first) - len(second)) <= 1


def test_questions_are_in_the_half_of_their_answer() -> None:
    halves = Halves("answer", EXAMPLES, PROMPTS, 0)
    answers = {example.answer for example in halves.first(EXAMPLES)}
    assert halves.first_groups(PROMPTS) == {p.group_id for p in PROMPTS if p.reference in answers}
    assert halves.second_groups(PROMPTS) == {p.group_id for p in PROMPTS} - halves.first_groups(PROMPTS)


def test_few_examples_cover_many_values() -> None:
    halves = Halves("answer", EXAMPLES, PROMPTS, 0)
    assert len({example.answer for example in halves.spread(EXAMPLES, 6)}) == 6
    assert len(halves.spread(EXAMPLES, 7)) == 7


def test_seeds_give_other_halves() -> None:
    assert len({frozenset(e.id for e in Halves("answer", EXAMPLES, [], seed).first(EXAMPLES)) for seed in range(9)}) > 1


def test_questions_of_other_knowledge_and_a_single_value_are_errors() -> None:
    stranger = PROMPTS[0].model_copy(update={"reference": "nothing like it"})
    with raises_code("conflicting-settings", field="halves"):
        Halves("answer", EXAMPLES, [*PROMPTS, stranger], 0)
    with raises_code("conflicting-settings", field="halves"):
        Halves("answer", EXAMPLES[:3], [], 0)
