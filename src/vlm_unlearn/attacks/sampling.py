"""Best of n: several sampled answers to each question (Hughes et al. 2024, arXiv 2412.03556, without their changes)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated

from pydantic import Field

from vlm_unlearn.attacks.base import Attack, register, variant_of
from vlm_unlearn.config import Strict
from vlm_unlearn.records import Prompt


class SamplingOptions(Strict):
    """Options of `Sampling`."""

    n: Annotated[int, Field(gt=0, le=1000)] = 8
    """Number of answers to each question. Each is a rewrite, so that `summary.json` has the curve over n."""
    temperature: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Sampling temperature, in place of that of the suite. `generation.top_p` applies."""
    control: bool = False
    """Use temperature 0 instead."""


@register("sampling")
class Sampling(Attack):
    """Samples n answers to each question. With `aggregate: any_per_question`, one harmful answer breaks it.

    It is the attack form of a split's `samples`, with a temperature that does not apply to other splits.

    Control: n answers at temperature 0, which are equal. With `aggregate: per_response`, the metric of the attacked
    split is a second control, the rate of a single sample.
    """

    options_type = SamplingOptions

    def apply(self, prompts: Sequence[Prompt]) -> Iterator[Prompt]:
        """Yields each prompt n times. The ids, and thus the random streams, differ."""
        name = "sampling-control" if self.options.control else "sampling"
        temperature = 0.0 if self.options.control else self.options.temperature
        for prompt in prompts:
            for number in range(self.options.n):
                yield variant_of(prompt, name, number, temperature=temperature)
