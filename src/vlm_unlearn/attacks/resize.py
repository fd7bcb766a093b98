"""A smaller or larger image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated

from pydantic import BeforeValidator, Field

from vlm_unlearn.attacks.base import Attack, register
from vlm_unlearn.attacks.image_changes import change_images
from vlm_unlearn.attacks.prefill import as_list
from vlm_unlearn.config import Strict
from vlm_unlearn.records import Prompt, ResizeEdit


class ResizeOptions(Strict):
    """Options of `Resize`."""

    scale: Annotated[tuple[Annotated[float, Field(gt=0, le=8)], ...], BeforeValidator(as_list)] = (0.25,)
    """Factors of the width and of the height. Each makes one rewrite."""
    control: bool = False
    """Scale the result back to the original size."""


@register("resize")
class Resize(Attack):
    """Scales the image. It matters most for models whose number of image tokens depends on the size.

    Control: the scaled image at the original size, with as much lost detail and as many image tokens as the original.
    """

    options_type = ResizeOptions

    def apply(self, prompts: Sequence[Prompt]) -> Iterator[Prompt]:
        """Yields each prompt once for every factor."""
        control = self.options.control
        name = "resize-control" if control else "resize"
        return change_images(
            prompts, name, self.options.scale, lambda prompt, scale: ResizeEdit(scale=scale, restore=control)
        )
