"""JPEG compression of the image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated

from pydantic import BeforeValidator, Field

from vlm_unlearn.attacks.base import Attack, register
from vlm_unlearn.attacks.image_changes import change_images
from vlm_unlearn.attacks.prefill import as_list
from vlm_unlearn.config import Strict
from vlm_unlearn.records import JpegEdit, Prompt

CONTROL_QUALITY = 95  # almost without loss


class JpegOptions(Strict):
    """Options of `Jpeg`."""

    quality: Annotated[tuple[Annotated[int, Field(ge=1, le=100)], ...], BeforeValidator(as_list)] = (10,)
    """Qualities, from 1 to 100. Each makes one rewrite."""
    control: bool = False
    """Compress with quality 95 instead."""


@register("jpeg")
class Jpeg(Attack):
    """Compresses the image as JPEG.

    Control: the same encoding with quality 95, which loses almost nothing.
    """

    options_type = JpegOptions

    def apply(self, prompts: Sequence[Prompt]) -> Iterator[Prompt]:
        """Yields each prompt once for every quality."""
        name, qualities = "jpeg", self.options.quality
        if self.options.control:
            name, qualities = "jpeg-control", (CONTROL_QUALITY,)
        return change_images(prompts, name, qualities, lambda prompt, quality: JpegEdit(quality=quality))
