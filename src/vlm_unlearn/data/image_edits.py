"""Applies the image edits of a prompt. Every backend and the pages of a report get the edited picture from here.

An edit is a small record of `vlm_unlearn.records`, so that ``prompts.jsonl`` describes the picture completely and no
image file is written. The same record gives the same pixels, on every machine with the same version of Pillow.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from vlm_unlearn.data.images import MAX_IMAGE_PIXELS, ImageReference, ImageSource, image_key, open_image
from vlm_unlearn.data.text_drawing import with_text
from vlm_unlearn.errors import UserError
from vlm_unlearn.records import (
    BlankEdit,
    BrightnessEdit,
    CropEdit,
    ImageEdit,
    JpegEdit,
    NoiseEdit,
    ResizeEdit,
    RotateEdit,
    TextEdit,
)
from vlm_unlearn.store import digest_json

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image


def edited_image(image: ImageSource, edits: Sequence[ImageEdit]) -> ImageSource:
    """Returns a reference to an image that opens with its edits applied. Without edits it is the image itself.

    Two references are equal if the image and all edits are, so that batches and caches keep edited pictures apart.

    Args:
        image: A file, or a reference.
        edits: The edits, in their order.
    """
    if not edits:
        return image
    digest = digest_json(["edited", image_key(image), edits_key(edits)])
    name = image.name if isinstance(image, ImageReference) else str(image)
    return ImageReference(digest, partial(_open_edited, image, tuple(edits)), name)


def edits_key(edits: Sequence[ImageEdit]) -> str:
    """Returns a digest of edits, or an empty text if there are none."""
    return digest_json([edit.model_dump(mode="json") for edit in edits]) if edits else ""


def apply_edits(image: Image.Image, edits: Sequence[ImageEdit]) -> Image.Image:
    """Returns an RGB image with edits applied in their order.

    Raises:
        UserError: The result of an edit is too large to open safely, or a text cannot be drawn.
    """
    for edit in edits:
        image = _apply(image, edit)
    return image


def _open_edited(image: ImageSource, edits: Sequence[ImageEdit]) -> Image.Image:
    return apply_edits(open_image(image), edits)


def _apply(image: Image.Image, edit: ImageEdit) -> Image.Image:
    from PIL import Image

    match edit:
        case JpegEdit():
            return _encoded_as_jpeg(image, edit.quality)
        case NoiseEdit():
            import numpy as np

            rng = np.random.default_rng(edit.seed)
            return _shifted(image, rng.normal(0.0, edit.std, (image.height, image.width, 3)))
        case BrightnessEdit():
            return _shifted(image, edit.shift)
        case CropEdit():
            return _cropped(image, edit)
        case RotateEdit():
            return _rotated(image, edit)
        case ResizeEdit():
            size = _scaled_size(image.size, edit.scale)
            resized = image.resize(size, Image.Resampling.BICUBIC)
            return resized.resize(image.size, Image.Resampling.BICUBIC) if edit.restore else resized
        case BlankEdit():
            return Image.new("RGB", image.size, edit.color)
        case TextEdit():
            return with_text(image, edit.text, edit.layout)


def _encoded_as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    from PIL import Image

    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=quality)
    with Image.open(buffer, formats=("JPEG",)) as decoded:
        result = decoded.convert("RGB")
    result.info = {}
    return result


def _shifted(image: Image.Image, change: float | NDArray[np.float64]) -> Image.Image:
    """Returns an image with a change added to its samples, rounded and clipped to 0 to 255."""
    import numpy as np
    from PIL import Image

    samples = np.asarray(image, dtype=np.float64) + change
    return Image.fromarray(np.clip(np.rint(samples), 0, 255).astype(np.uint8))


def _cropped(image: Image.Image, edit: CropEdit) -> Image.Image:
    """Returns the rectangle of a crop. It has at least one pixel and does not leave the picture."""
    width, height = max(1, round(edit.width * image.width)), max(1, round(edit.height * image.height))
    left = min(round(edit.left * image.width), image.width - width)
    top = min(round(edit.top * image.height), image.height - height)
    return image.crop((left, top, left + width, top + height))


def _rotated(image: Image.Image, edit: RotateEdit) -> Image.Image:
    from PIL import Image

    turned = image.rotate(edit.degrees, Image.Resampling.BICUBIC, expand=True, fillcolor=(255, 255, 255))
    if not edit.upright:
        return turned
    canvas = Image.new("RGB", turned.size, (255, 255, 255))
    canvas.paste(image, ((canvas.width - image.width) // 2, (canvas.height - image.height) // 2))
    return canvas


def _scaled_size(size: tuple[int, int], scale: float) -> tuple[int, int]:
    width, height = (max(1, round(scale * length)) for length in size)
    if width * height > MAX_IMAGE_PIXELS:
        raise UserError(
            f"has {width} x {height} pixels after it is resized, more than {MAX_IMAGE_PIXELS}. Use a smaller scale.",
            code="image-too-large",
        )
    return width, height
