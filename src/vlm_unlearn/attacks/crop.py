"""A part of the image."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from vlm_unlearn.attacks.base import Attack, register
from vlm_unlearn.attacks.image_changes import change_images, image_seed
from vlm_unlearn.attacks.prefill import as_list
from vlm_unlearn.config import Strict
from vlm_unlearn.records import CropEdit, ImageEdit, Prompt, ResizeEdit


class CropOptions(Strict):
    """Options of `Crop`."""

    share: Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], BeforeValidator(as_list)] = (0.5,)
    """Shares of the width and of the height that remain. Each makes one rewrite."""
    position: Literal["center", "random"] = "center"
    """Position of the rectangle. `random` has the same position for the same image."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of random positions."""
    control: bool = False
    """Shrink the complete image to the same size instead."""


@register("crop")
class Crop(Attack):
    """Cuts a rectangle out of the image.

    Control: the complete image, shrunk to the size of the rectangle. It has as few pixels, and nothing is cut off.
    """

    options_type = CropOptions

    def apply(self, prompts: Sequence[Prompt]) -> Iterator[Prompt]:
        """Yields each prompt once for every share."""
        name = "crop-control" if self.options.control else "crop"
        return change_images(prompts, name, self.options.share, self._edit)

    def _edit(self, prompt: Prompt, share: float) -> ImageEdit:
        if self.options.control:
            return ResizeEdit(scale=share)
        left = top = 0.5
        if self.options.position == "random":
            rng = random.Random(image_seed(self.options.seed, prompt))
            left, top = rng.random(), rng.random()
        return CropEdit(left=round(left * (1 - share), 6), top=round(top * (1 - share), 6), width=share, height=share)
