"""A turned image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated

from pydantic import BeforeValidator, Field

from vlm_unlearn.attacks.base import Attack, register
from vlm_unlearn.attacks.image_changes import change_images
from vlm_unlearn.attacks.prefill import as_list
from vlm_unlearn.config import Strict
from vlm_unlearn.records import Prompt, RotateEdit


class RotateOptions(Strict):
    """Options of `Rotate`."""

    degrees: Annotated[tuple[Annotated[float, Field(ge=-360, le=360)], ...], BeforeValidator(as_list)] = (30.0,)
    """Angles, counterclockwise. Each makes one rewrite."""
    control: bool = False
    """Put the upright image on the same canvas instead."""


@register("rotate")
class Rotate(Attack):
    """Turns the image on a white canvas that contains all of it.

    Control: the upright image on a canvas of the same size, so that the picture is as small and has as much white
    around it.
    """

    options_type = RotateOptions

    def apply(self, prompts: Sequence[Prompt]) -> Iterator[Prompt]:
        """Yields each prompt once for every angle."""
        control = self.options.control
        name = "rotate-control" if control else "rotate"
        return change_images(
            prompts, name, self.options.degrees, lambda prompt, degrees: RotateEdit(degrees=degrees, upright=control)
        )
