"""Attacks: a function, and a class with options."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated

from pydantic import Field

from vlm_unlearn.attacks.base import Attack
from vlm_unlearn.config import Strict
from vlm_unlearn.records import Prompt


def polite(prompts: Sequence[Prompt], word: str = "Please") -> Iterable[Prompt]:
    """Returns the prompts with a polite beginning."""
    return [prompt.model_copy(update={"question": f"{word}, {prompt.question}"}) for prompt in prompts]


class RepeatedOptions(Strict):
    """The options of repeated."""

    times: Annotated[int, Field(gt=0, le=5)] = 2
    """Number of rewrites. The rewrite with the number n repeats the question n more times."""


class Repeated(Attack):
    """Repeats each question."""

    options_type = RepeatedOptions

    def apply(self, prompts: Sequence[Prompt]) -> Iterator[Prompt]:
        """Yields each prompt as several rewrites."""
        for prompt in prompts:
            for number in range(self.options.times):
                question = " ".join([prompt.question] * (number + 1))
                yield prompt.model_copy(update={"id": f"{prompt.id}/repeated{number}", "question": question})
