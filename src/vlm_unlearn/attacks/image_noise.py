"""Gaussian noise on the image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated

from pydantic import BeforeValidator, Field

from vlm_unlearn.attacks.base import Attack, register
from vlm_unlearn.attacks.image_changes import change_images, image_seed
from vlm_unlearn.attacks.prefill import as_list
from vlm_unlearn.config import Strict
from vlm_unlearn.records import BrightnessEdit, ImageEdit, NoiseEdit, Prompt


class ImageNoiseOptions(Strict):
    """Options of `ImageNoise`."""

    std: Annotated[tuple[Annotated[float, Field(gt=0, le=255)], ...], BeforeValidator(as_list)] = (25.0,)
    """Standard deviations of the noise, in levels from 0 to 255. Each makes one rewrite."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the noise."""
    control: bool = False
    """Darken the image by the standard deviation instead."""


@register("image_noise")
class ImageNoise(Attack):
    """Adds Gaussian noise to the image.

    Control: every sample becomes darker by the standard deviation. The samples change by as much (in the mean square),
    and nothing in the picture is hidden.
    """

    options_type = ImageNoiseOptions

    def apply(self, prompts: Sequence[Prompt]) -> Iterator[Prompt]:
        """Yields each prompt once for every standard deviation."""
        name = "image_noise-control" if self.options.control else "image_noise"
        return change_images(prompts, name, self.options.std, self._edit)

    def _edit(self, prompt: Prompt, std: float) -> ImageEdit:
        if self.options.control:
            return BrightnessEdit(shift=-std)
        return NoiseEdit(std=std, seed=image_seed(self.options.seed, prompt))
