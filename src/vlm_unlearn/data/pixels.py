"""The pixels of an opened image in RGB, as image viewers show them.

Pillow's ``convert("RGB")`` ignores the EXIF orientation, clips samples of more than 8 bits, and shows the hidden colors
of transparent pixels.
"""

from __future__ import annotations

import io
import struct
from typing import TYPE_CHECKING, Any

from vlm_unlearn.records import ImageLoader

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

ORIENTATION = 0x0112  # the EXIF tag
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PIXEL_CHUNKS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"eXIf"}  # what determines the pixels of a PNG
MAX_LOST_SHARE = 0.25  # of the pixels of a truncated JPEG. With more lost, the image is broken.


def shown_size(image: Image.Image, loader: ImageLoader = "viewer") -> tuple[int, int]:
    """Returns the width and height at which an image is shown. It is not decoded."""
    width, height = image.size
    turned = loader == "viewer" and orientation(image) >= 5
    return (height, width) if turned else (width, height)


def to_rgb(image: Image.Image, loader: ImageLoader = "viewer", max_side: int | None = None) -> Image.Image:
    """Returns an image as RGB without metadata.

    The orientation is applied, samples of more than 8 bits are scaled, and transparency is composited on white.

    Args:
        image: The image. It is decoded.
        loader: ``llava`` converts the mode only.
        max_side: Maximum length of the longer side in pixels. A larger image is shrunk.
    """
    turn = orientation(image) if loader == "viewer" else 1  # loading may remove the metadata
    image.load()
    rgb = _converted(image) if loader == "viewer" else image.convert("RGB")
    if max_side is not None:
        rgb.thumbnail((max_side, max_side))
    if turn != 1:
        rgb = rgb.transpose(_transpositions()[turn])
    rgb.info.clear()  # a saved copy would have the profile and the transparent color
    return rgb


def orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation that must be applied to an image's pixels, from 1 (none) to 8."""
    from PIL import Image

    if image.format == "TIFF":  # Pillow applies it
        return 1
    content = image.info.get("exif")
    if content is None:
        text = image.info.get("Raw profile type exif")  # as ImageMagick writes it into a PNG
        if not isinstance(text, str | bytes):
            return 1
        text = text.decode("latin-1") if isinstance(text, bytes) else text
        try:
            content = bytes.fromhex("".join(text.split("\n")[3:]))
        except ValueError:
            return 1
    exif = Image.Exif()
    try:
        exif.load(content)
        value: Any = exif.get(ORIENTATION, 1)
    except Exception:  # broken metadata raises many types of errors, and viewers ignore it
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _transpositions() -> dict[int, Any]:
    from PIL.Image import Transpose

    return {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }


def _converted(image: Image.Image) -> Image.Image:
    """Returns a decoded image as RGB, with scaled samples and on white."""
    mode = image.mode
    if mode.startswith("I;16") or mode in ("I", "F"):
        return _from_deep_samples(image)
    transparency = image.info.get("transparency")
    if mode == "RGB" and transparency is not None and max(transparency, default=0) > 255:
        # The transparent color of a PNG with 16 bits per sample, of which Pillow keeps the upper 8.
        image = image.copy()
        image.info["transparency"] = tuple(value >> 8 for value in transparency)
    if image.has_transparency_data:
        return _on_white(image)
    return image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode == "La":
        image = image.convert("LA")
    rgba = image if image.mode == "RGBA" else image.convert("RGBA")
    if rgba.getchannel("A").getextrema()[0] == 255:
        return rgba.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _from_deep_samples(image: Image.Image) -> Image.Image:
    """Returns a gray image with integers of 16 or 32 bits, or floats, scaled to 8 bits."""
    import numpy as np
    from PIL import Image

    samples = np.asarray(image)
    gray = _scaled(samples, is_16_bit=image.mode.startswith("I;16"))
    transparent = image.info.get("transparency")  # the gray value of a PNG's tRNS chunk
    if isinstance(transparent, int):
        gray[samples == transparent] = 255
    return Image.fromarray(gray).convert("RGB")


def _scaled(samples: NDArray[Any], is_16_bit: bool) -> NDArray[np.uint8]:
    """Returns samples as 8-bit values.

    Integers of 16 bits have their full range. Other files do not state the range of their samples. It is the smallest
    of 0 to 1 (floats only), 0 to 255 and 0 to 65535 that contains all samples, or else that of the samples. Samples
    that are not numbers are black.
    """
    import numpy as np

    if is_16_bit:
        return ((samples.astype(np.uint32) + 128) // 257).astype(np.uint8)
    is_float = samples.dtype.kind == "f"
    values = samples.astype(np.float64)
    finite = np.isfinite(values)
    low, high = (float(values[finite].min()), float(values[finite].max())) if finite.any() else (0.0, 0.0)
    values = np.clip(np.nan_to_num(values, nan=low, posinf=high, neginf=low), low, high)
    ranges = ([1.0] if is_float else []) + [255.0, 65535.0]
    top = next((limit for limit in ranges if low >= 0 and high <= limit), None)
    if top is None:
        values, top = values - low, (high - low) or 1.0
    gray = np.rint(values * (255.0 / top))
    gray[np.isnan(samples)] = 0
    return gray.astype(np.uint8)


def without_metadata(content: bytes) -> bytes | None:
    """Returns a PNG file without the chunks that do not change its pixels, or None if it is not a PNG file.

    Pillow rejects files whose compressed text or color profile is large, which viewers open.
    """
    if not content.startswith(PNG_SIGNATURE):
        return None
    chunks, position = [PNG_SIGNATURE], len(PNG_SIGNATURE)
    while position + 12 <= len(content):
        length, name = struct.unpack_from(">I4s", content, position)
        end = position + 12 + length
        if name in PIXEL_CHUNKS:
            chunks.append(content[position:end])
        position = end
    return b"".join(chunks)


def complete_jpeg(content: bytes) -> bytes | None:
    """Returns a JPEG file that lacks its last bytes with an end, or None if too much is missing.

    A decoder fills the missing pixels. They are those that depend on data after the end.
    """
    import random

    from PIL import Image, ImageChops

    if not content.startswith(b"\xff\xd8\xff"):
        return None
    content = content[:-1] if content.endswith(b"\xff") else content
    noise = bytes(random.Random(0).choices(range(255), k=4096))  # without 0xFF, which starts a marker
    try:
        with Image.open(io.BytesIO(content + b"\xff\xd9"), formats=("JPEG",)) as image:
            gray = image.convert("L")
        with Image.open(io.BytesIO(content + noise + b"\xff\xd9"), formats=("JPEG",)) as image:
            lost = ImageChops.difference(gray, image.convert("L"))
    except Exception:  # the decoders raise many types of errors for broken files
        return None
    counts = lost.histogram()
    share = 1 - sum(counts[:3]) / (gray.width * gray.height)
    return content + b"\xff\xd9" if share <= MAX_LOST_SHARE else None
