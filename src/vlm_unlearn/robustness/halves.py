"""Divides the forget set and the questions into two halves that have no knowledge in common."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Literal

from vlm_unlearn.errors import UserError
from vlm_unlearn.records import Example, Prompt

Key = Literal["answer", "image", "category", "id"]


class Halves:
    """Two halves of the harmful knowledge. Attacks train on examples of the first and measure on the second.

    Each value of the key is in one half, so that the second half shares no answer (or image, or category) with the
    first. The values are shuffled by the seed and divided in the middle.

    Args:
        key: The field that examples and questions of the same knowledge have in common.
        examples: The forget set.
        prompts: The harmful questions.
        seed: The seed of the division.

    Raises:
        UserError: A question has a value that no example has, or fewer than two values occur.
    """

    def __init__(self, key: Key, examples: Sequence[Example], prompts: Sequence[Prompt], seed: int) -> None:
        self._key: Key = key
        values = sorted({_value(example, key) for example in examples})
        missing = sorted({_value(prompt, key) for prompt in prompts} - set(values))
        if missing:
            raise UserError(
                f"{len(missing)} of the questions' values of `{key}` do not occur in the forget set. Set `halves` to a "
                "field that both have in common, or ask the questions of the forget set.",
                code="conflicting-settings",
                field="halves",
            )
        if len(values) < 2:
            raise UserError(
                f"the forget set has only one value of `{key}`. Set `halves` to another field.",
                code="conflicting-settings",
                field="halves",
            )
        random.Random(f"halves-{seed}").shuffle(values)
        self._first = set(values[: (len(values) + 1) // 2])

    def first(self, examples: Iterable[Example]) -> list[Example]:
        """Returns the examples of the first half."""
        return [example for example in examples if _value(example, self._key) in self._first]

    def second(self, examples: Iterable[Example]) -> list[Example]:
        """Returns the examples of the second half."""
        return [example for example in examples if _value(example, self._key) not in self._first]

    def first_groups(self, prompts: Iterable[Prompt]) -> frozenset[str]:
        """Returns the groups of the questions of the first half."""
        return frozenset(prompt.group_id for prompt in prompts if _value(prompt, self._key) in self._first)

    def second_groups(self, prompts: Iterable[Prompt]) -> frozenset[str]:
        """Returns the groups of the questions of the second half."""
        return frozenset(prompt.group_id for prompt in prompts if _value(prompt, self._key) not in self._first)

    def spread(self, examples: Sequence[Example], count: int) -> list[Example]:
        """Returns `count` examples that cover as many values of the key as possible, in the order of the examples."""
        turns: dict[str, int] = {}
        ranked = []
        for index, example in enumerate(examples):
            value = _value(example, self._key)
            turns[value] = turns.get(value, -1) + 1
            ranked.append((turns[value], index))
        return [examples[index] for index in sorted(index for _, index in sorted(ranked)[:count])]


def _value(record: Example | Prompt, key: Key) -> str:
    if key == "answer":
        value = record.reference if isinstance(record, Prompt) else record.answer
    elif key == "image":
        value = record.image
    elif key == "category":
        value = record.category
    else:
        value = record.group_id if isinstance(record, Prompt) else record.id
    return value or ""
