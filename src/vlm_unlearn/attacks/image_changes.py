"""Changes the images of prompts, for the attacks that do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from vlm_unlearn.attacks.base import variant_of
from vlm_unlearn.errors import UserError, quoted
from vlm_unlearn.records import ImageEdit, Prompt
from vlm_unlearn.store import digest_json

Value = TypeVar("Value")


def change_images(
    prompts: Sequence[Prompt], name: str, values: Sequence[Value], edit: Callable[[Prompt, Value], ImageEdit]
) -> Iterator[Prompt]:
    """Yields each prompt once for every value of an option, with a further edit of its image.

    Args:
        prompts: The prompts.
        name: The name of the attack. With a value, it is the name of a variant, such as ``jpeg/10``.
        values: The values. None is not part of the name.
        edit: Returns the edit of a prompt's image for a value.

    Raises:
        UserError: A prompt has no image.
    """
    for prompt in prompts:
        if prompt.image is None:
            raise UserError(
                "has no image to change. Use the attack on splits whose questions have images.",
                code="missing-image",
                record=quoted(prompt.id),
                field="attack",
            )
        for value in values:
            label = f"{value:g}" if isinstance(value, int | float) else str(value)
            variant = name if value is None else f"{name}/{label}"
            yield variant_of(prompt, variant, image_edits=(*prompt.image_edits, edit(prompt, value)))


def image_seed(seed: int, prompt: Prompt) -> int:
    """Returns the seed for the image of a prompt. The same image has the same seed, in every rewrite of a question."""
    return int(digest_json([seed, prompt.image])[:8], 16)
