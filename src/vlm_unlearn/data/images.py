"""Finds and opens images below a root. Paths and files come from other people, so that neither is trusted."""

from __future__ import annotations

import base64
import io
import warnings
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING

from vlm_unlearn.errors import UserError, quoted

if TYPE_CHECKING:
    from PIL import Image

# What annotated image sets hold. Formats that run an interpreter or a decoder of their own (EPS, PDF, ...) are never tried.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # a telephone's MPO opens as JPEG
MAX_IMAGE_SIDE = 32_768
MAX_IMAGE_PIXELS = (
    89_478_485  # Pillow's own line between a photograph and a decompression bomb: a quarter of a GiB as RGB
)

# Refused below, so that a warning would say the same twice.
warnings.filterwarnings("ignore", message="Image size .* could be decompression bomb")


def resolve_image(root: Path, relative: str, where: str) -> Path:
    """The file of an image named by a record.

    Args:
        root: the image root.
        relative: the path the record gives, with forward slashes.
        where: the record, for the error: ``train.json: record 17 (line 203, "Ads_333539")``.

    Raises:
        UserError: the path is absolute, leaves the root (``..`` or a link), or names no file.
    """
    named = f"{where}: image {quoted(relative)}"
    windows = PureWindowsPath(relative)
    parts = PurePosixPath(relative.replace("\\", "/"))
    if "\0" in relative or not relative.strip():
        raise UserError(f"{named} is not a path")
    if parts.is_absolute() or windows.drive or ".." in parts.parts:
        raise UserError(f"{named} leaves the image folder {root}; paths must be relative and inside it")
    try:
        path = (root / parts).resolve()
        inside = path.is_relative_to(root.resolve())
        found = path.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # a loop of links, a name no file can have
        reason = error.strerror if isinstance(error, OSError) else type(error).__name__
        raise UserError(f"{named}: {reason}") from None
    if not inside:
        raise UserError(f"{named} is a link out of the image folder {root}")
    if not found:
        raise UserError(f"{named} not found under {root}; correct its path, or the image folder (--images)")
    return path


def image_size(path: Path) -> tuple[int, int]:
    """Width and height in pixels, from the file's header.

    Raises:
        UserError: the file is no image, or too large to be opened safely.
    """
    with _open(path) as image:
        return image.size


def open_image(path: Path, at_most: int | None = None) -> Image.Image:
    """Opens an image as RGB; of an animation the first frame.

    Args:
        at_most: pixels of the longer side, to which a larger image is shrunk; a JPEG is decoded no larger than needed.

    Raises:
        UserError: the file is no image, is broken or cut short, or is too large to be opened safely.
    """
    with _open(path) as image:
        try:
            if at_most is None:
                return image.convert("RGB")
            image.draft("RGB", (at_most, at_most))
            shrunk = image.convert("RGB")
            shrunk.thumbnail((at_most, at_most))
            return shrunk
        except Exception as error:  # decoders raise whatever a broken file leads them to
            raise UserError(f"{path}: is a broken image ({_reason(error)})") from None


def png_url(image: Image.Image) -> str:
    """An image as a data URL, in the one format that every server and browser reads."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _open(path: Path) -> Image.Image:
    from PIL import Image

    try:
        if path.stat().st_size == 0:
            raise UserError(f"{path}: is an empty file")
        image = Image.open(path, formats=FORMATS)
    except UserError:
        raise
    except Image.DecompressionBombError:
        raise UserError(f"{path}: has more than {MAX_IMAGE_PIXELS} pixels; resize it") from None
    except Exception as error:
        raise UserError(f"{path}: is not an image of a known format ({', '.join(FORMATS)}; {_reason(error)})") from None
    width, height = image.size
    problem = None
    if width * height > MAX_IMAGE_PIXELS:
        problem = f"has {width} x {height} pixels, more than {MAX_IMAGE_PIXELS}"
    elif max(width, height) > MAX_IMAGE_SIDE:
        problem = f"is {width} x {height} pixels, a side longer than {MAX_IMAGE_SIDE}"
    elif min(width, height) < 1:
        problem = "has no pixels"
    if problem:
        image.close()
        raise UserError(f"{path}: {problem}; resize it")
    return image


def _reason(error: Exception) -> str:
    return type(error).__name__
