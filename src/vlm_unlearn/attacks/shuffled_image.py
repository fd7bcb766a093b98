"""The question with the image of another question."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Annotated

from pydantic import Field

from vlm_unlearn.attacks.base import Attack, register, variant_of
from vlm_unlearn.config import Strict
from vlm_unlearn.errors import UserError, quoted
from vlm_unlearn.records import Prompt


class ShuffledImageOptions(Strict):
    """Options of `ShuffledImage`."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the order of the images."""


@register("shuffled_image")
class ShuffledImage(Attack):
    """Exchanges the images of a split, so that every question has the image of another one.

    The same image is always replaced by the same other image. A prompt without an image stays without one.

    Control: it is itself a control, of `no_image` and `blank_image`. It keeps a picture of the split's kind.
    """

    options_type = ShuffledImageOptions

    def apply(self, prompts: Sequence[Prompt]) -> Iterator[Prompt]:
        """Yields each prompt with another image of its set.

        Raises:
            UserError: A set has a single image.
        """
        images: dict[str, list[str]] = {}
        for prompt in prompts:
            if prompt.image is not None:
                images.setdefault(prompt.set, []).append(prompt.image)
        replacements = {name: self._exchanged(name, list(dict.fromkeys(used))) for name, used in images.items()}
        for prompt in prompts:
            image = None if prompt.image is None else replacements[prompt.set][prompt.image]
            yield variant_of(prompt, "shuffled_image", image=image)

    def _exchanged(self, name: str, images: list[str]) -> dict[str, str]:
        """Returns the image that replaces each image: the next one in a random cycle of all images."""
        if len(images) < 2:
            raise UserError(
                f"the split {quoted(name)} has a single image, which cannot be exchanged.",
                code="unsupported-setting",
                field="attack",
            )
        order = random.Random(self.options.seed).sample(images, len(images))
        return dict(zip(order, [*order[1:], order[0]], strict=True))
