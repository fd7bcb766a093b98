"""Converts images to RGB as image viewers show them, and repairs files that viewers open and Pillow rejects."""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

# Part of the keys of everything that is made of pixels and kept: features, reference values, replies of chat models and
# thumbnails. Increase it when the pixels of any image change.
DECODER_VERSION = 2
ORIENTATION = 0x0112  # tag of EXIF and TIFF
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Chunks that the pixels depend on. Pillow limits the size of the others, such as text and color profiles.
PIXEL_CHUNKS = (b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"eXIf")
MAX_CHUNKS = 20_000  # chunks of a PNG that are walked, which takes as long as reading tens of megabytes
JPEG_END = b"\xff\xd9"
# A truncated JPEG is complete enough if its data reaches the last row of blocks, which has at most 16 lines. Smoothing
# between blocks changes up to two lines above it.
LAST_BLOCK_LINES = 18


def to_rgb(image: Image.Image, max_side: int | None = None) -> Image.Image:
    """Returns an image as RGB with the pixels that image viewers show.

    - The EXIF orientation is applied.
    - Transparent pixels are composited on white.
    - Samples of 16 bits lose their low byte. Other integers and floats are scaled by the range that they use: 0 to 1,
      8 bits, 16 bits, or else their minimum and maximum.

    Args:
        image: The image. It need not be decoded.
        max_side: Maximum length of the longer side in pixels.

    Raises:
        Exception: The decoders of Pillow raise many types of errors for broken files.
    """
    color_key = _color_key(image)
    if max_side is not None:
        image.draft("RGB", (max_side, max_side))
    image.load()  # also reads the EXIF data of a PNG that follow its pixels
    orientation = exif_orientation(image)
    rgb = _without_transparency(image, color_key)
    if max_side is not None:
        rgb.thumbnail((max_side, max_side))
    return _transposed(rgb, orientation)


def exif_orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation from 1 to 8 that is still to be applied. It is 1 without valid EXIF data."""
    if image.format == "TIFF":
        return 1  # Pillow applies it
    if "exif" not in image.info and not _has_late_exif(image):
        return 1
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except Exception:  # broken EXIF data raise many types of errors
        return 1
    return orientation if orientation in range(1, 9) else 1


def displayed_size(image: Image.Image) -> tuple[int, int]:
    """Returns the width and the height of an image after its EXIF orientation is applied."""
    width, height = image.size
    return (height, width) if exif_orientation(image) >= 5 else (width, height)


def _has_late_exif(image: Image.Image) -> bool:
    """Returns whether a PNG may have EXIF data behind its pixels that Pillow would decode it to read.

    Only the headers of the chunks are read.
    """
    stream: Any = getattr(image, "fp", None)
    if image.format != "PNG" or stream is None or not getattr(image, "tile", None):
        return False
    position = stream.tell()
    start = len(PNG_SIGNATURE)
    read = _reader(stream)
    try:
        for _ in range(MAX_CHUNKS):
            header = read(start)
            if len(header) < 8 or header[4:] in (b"IEND", b"eXIf"):
                return header[4:] == b"eXIf"
            start += int.from_bytes(header[:4], "big") + 12  # with the header and the checksum
        stream.seek(start)
        return b"eXIf" in stream.read()
    finally:
        stream.seek(position)


def _reader(stream: Any) -> Callable[[int], bytes]:
    """Returns a function that reads the header of the chunk at a position, 8 bytes, or fewer at the end."""
    try:
        descriptor = stream.fileno() if hasattr(os, "pread") else None
    except (AttributeError, OSError):  # bytes in memory
        descriptor = None
    if descriptor is not None:
        # A buffered stream would read some kilobytes at each position.
        return lambda start: os.pread(descriptor, 8, start)

    def read(start: int) -> bytes:
        stream.seek(start)
        header: bytes = stream.read(8)
        return header

    return read


def _transposed(image: Image.Image, orientation: int) -> Image.Image:
    from PIL.Image import Transpose

    methods = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    # The result has no metadata, so that no later step applies the orientation again.
    image.info = {}
    return image.transpose(methods[orientation]) if orientation in methods else image


def _color_key(image: Any) -> int | tuple[int, ...] | None:
    """Returns the sample value of the pixels that are transparent, scaled to the samples of Pillow, or None.

    The header of a PNG contains it in the file's bit depth.
    """
    key = image.info.get("transparency")
    if image.mode in ("P", "PA") or not isinstance(key, int | tuple):
        return None
    raw_mode = str(image.tile[0][3]) if image.format == "PNG" and getattr(image, "tile", None) else ""
    if isinstance(key, tuple):
        return tuple(value >> 8 for value in key) if "16" in raw_mode else key
    return key * {"1": 255, "L;2": 85, "L;4": 17}.get(raw_mode, 1)


def _without_transparency(image: Image.Image, color_key: int | tuple[int, ...] | None) -> Image.Image:
    """Returns the image as RGB, with transparent pixels composited on white."""
    from PIL import Image

    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        rgb = _eight_bits(image).convert("RGB")
    elif image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or (image.mode == "P" and image.has_transparency_data):
        rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        if rgba.getchannel("A").getextrema() == (255, 255):
            return rgba.convert("RGB")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    else:
        rgb = image.convert("RGB")
    if color_key is None:
        return rgb
    import numpy as np

    samples = np.asarray(image.convert("L") if image.mode == "1" else image)
    is_key = samples == np.asarray(color_key)
    mask = Image.fromarray(is_key.all(axis=-1) if samples.ndim == 3 else is_key)
    rgb = rgb.copy() if rgb is image else rgb
    rgb.paste((255, 255, 255), mask=mask)
    return rgb


def _eight_bits(image: Image.Image) -> Image.Image:
    """Returns a gray image of more than 8 bits per sample in 8 bits."""
    import numpy as np
    from PIL import Image

    samples: NDArray[Any] = np.asarray(image)
    tags: Any = getattr(image, "tag_v2", {})  # of a TIFF
    bits = (tags.get(258) or (0,))[0]
    if image.mode == "F":
        gray = _scaled_floats(samples)
    elif image.mode.startswith("I;"):
        gray = samples >> (bits - 8 if 8 < bits < 16 else 8)
    elif bits == 32 and (tags.get(339) or (1,))[0] == 1:  # unsigned, which Pillow reads as signed
        gray = _scaled_integers(samples.view(np.uint32))
    else:
        gray = _scaled_integers(samples)
    if tags.get(262) == 0:  # white is zero, which Pillow respects only for up to 8 bits
        gray = 255 - gray
    return Image.fromarray(gray.astype(np.uint8))


def _scaled_integers(samples: NDArray[Any]) -> NDArray[Any]:
    low, high = int(samples.min()), int(samples.max())
    if low >= 0 and high <= 65535:
        return samples >> 8 if high > 255 else samples
    return _stretched(samples, low, high)


def _scaled_floats(samples: NDArray[Any]) -> NDArray[Any]:
    import numpy as np

    finite = samples[np.isfinite(samples)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    samples = np.nan_to_num(samples, nan=low, posinf=high, neginf=low)  # what is not a number is as dark as possible
    limit = next((limit for limit in (1, 255, 65535) if low >= 0 and high <= limit), None)
    return np.rint(samples * (255 / limit)) if limit else _stretched(samples, low, high)


def _stretched(samples: NDArray[Any], low: float, high: float) -> NDArray[Any]:
    import numpy as np

    stretched: NDArray[np.float64] = np.rint((samples.astype(np.float64) - low) * (255 / max(high - low, 1e-300)))
    return stretched


def repaired_file(data: bytes) -> bytes | None:
    """Returns the bytes of an image file that Pillow rejects but viewers open in a form that Pillow opens, or None.

    A PNG loses the metadata that its pixels do not depend on, since Pillow limits the size of metadata and rejects
    damaged metadata. A JPEG that lacks its last bytes is completed if its data reaches the last row of blocks. libjpeg
    repeats the last color for the missing blocks, as viewers do.
    """
    if data.startswith(PNG_SIGNATURE):
        stripped = _without_png_metadata(data)
        return stripped if stripped != data else None
    if data.startswith(b"\xff\xd8") and _reaches_last_blocks(data):
        return data + JPEG_END
    return None


def _without_png_metadata(data: bytes) -> bytes:
    chunks, position = [PNG_SIGNATURE], len(PNG_SIGNATURE)
    while position + 12 <= len(data):
        length, name = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        if name in PIXEL_CHUNKS or name[:1].isupper():  # an unknown critical chunk stays an error
            chunks.append(data[position:end])
        position = end
    return b"".join(chunks)


def _reaches_last_blocks(data: bytes) -> bool:
    """Returns whether the data of a truncated JPEG reaches the last row of blocks.

    The pixels that change if a few more bytes are missing are where the data ends. In an area of one color nothing
    changes, so that the number of bytes is increased.
    """
    from PIL import ImageChops

    completed = _decoded(data)
    if completed is None:
        return False
    if completed.info.get("progressive"):
        # The earlier scans contain all blocks if the last scan refines them. No FF DA occurs within encoded blocks.
        scan = data.rfind(b"\xff\xda")
        header = data[scan + 2 : scan + 2 + int.from_bytes(data[scan + 2 : scan + 4], "big")]
        return header[-1] >> 4 > 0
    num_bytes = 2
    while num_bytes <= len(data) // 4:
        shorter = _decoded(data[:-num_bytes])
        box = ImageChops.difference(completed, shorter).getbbox() if shorter is not None else None
        if box is not None:
            return completed.height - box[1] <= LAST_BLOCK_LINES
        num_bytes *= 4
    return False


def _decoded(data: bytes) -> Image.Image | None:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data + JPEG_END), formats=("JPEG",)) as image:
            return image.convert("RGB")
    except Exception:  # the decoders raise many types of errors for broken files
        return None
