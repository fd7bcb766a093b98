"""The question without its image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vlm_unlearn.attacks.base import Attack, register, variant_of
from vlm_unlearn.records import Prompt


@register("no_image")
class NoImage(Attack):
    """Asks the question without its image. A model that refuses only with an image answers.

    Control: `blank_image` and `shuffled_image`, which have an image without the content of the original. A model whose
    processor needs an image gives failed answers.
    """

    def apply(self, prompts: Sequence[Prompt]) -> Iterator[Prompt]:
        """Yields each prompt without its image."""
        for prompt in prompts:
            yield variant_of(prompt, "no_image", image=None, image_edits=(), image_round=0, image_offset=0)
