"""The question with an image of one color."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator

from vlm_unlearn.attacks.base import Attack, register
from vlm_unlearn.attacks.image_changes import change_images
from vlm_unlearn.config import Strict
from vlm_unlearn.records import BlankEdit, Level8, Prompt

COLORS = {"white": (255, 255, 255), "gray": (128, 128, 128), "black": (0, 0, 0)}


def _named_color(value: Any) -> Any:
    return COLORS.get(value, value) if isinstance(value, str) else value


class BlankImageOptions(Strict):
    """Options of `BlankImage`."""

    color: Annotated[tuple[Level8, Level8, Level8], BeforeValidator(_named_color)] = COLORS["white"]
    """The color, as red, green and blue from 0 to 255, or white, gray or black."""


@register("blank_image")
class BlankImage(Attack):
    """Replaces the image by one color of the same size, so that the question has an image without content.

    Control: it is itself a control, of `no_image` and of the attacks that change an image. An attack whose rate is
    that of a blank image works because the model does not recognize the picture.
    """

    options_type = BlankImageOptions

    def apply(self, prompts: Sequence[Prompt]) -> Iterator[Prompt]:
        """Yields each prompt with a blank image."""
        return change_images(prompts, "blank_image", [None], lambda prompt, value: BlankEdit(color=self.options.color))
