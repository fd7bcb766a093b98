"""Finds and opens images below an image root. Paths and files come from third parties and are not trusted."""

from __future__ import annotations

import base64
import io
import warnings
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING

from vlm_unlearn.errors import UserError, quoted

if TYPE_CHECKING:
    from PIL import Image

# The formats of published image sets. Formats with an interpreter or an external decoder (EPS, PDF, ...) are never
# tried.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # MPO, which some phones write, opens as JPEG
MAX_IMAGE_SIDE = 32_768
MAX_IMAGE_PIXELS = 89_478_485  # Pillow's limit for a decompression bomb: a quarter of a GiB as RGB

# _open raises for these images, so that Pillow's warning would only repeat the error.
warnings.filterwarnings("ignore", message="Image size .* could be decompression bomb")


def resolve_image(root: Path, relative: str, file: str | Path | None = None, record: str | int | None = None) -> Path:
    """Returns the file of an image that a record names.

    Args:
        root: The image root.
        relative: The path in the record, with forward slashes, relative to the root.
        file: The data file that names the image, for the error.
        record: The record that names the image, for the error, such as ``17 (line 203, "Ads_333539")``.

    Raises:
        UserError: The path is absolute, leaves the root (through ``..`` or a link), or is not a file.
    """

    def error(problem: str, code: str) -> UserError:
        return UserError(f"image {quoted(relative)} {problem}", code=code, file=file, record=record)

    windows_path = PureWindowsPath(relative)
    posix_path = PurePosixPath(relative.replace("\\", "/"))
    if "\0" in relative or not relative.strip():
        raise error("is not a path", "invalid-field")
    if posix_path.is_absolute() or windows_path.drive or ".." in posix_path.parts:
        raise error(f"is outside the image folder {root}. Use a relative path inside the folder.", "image-outside-root")
    try:
        path = (root / posix_path).resolve()
        is_inside = path.is_relative_to(root.resolve())
        is_file = path.is_file()
    except (OSError, ValueError, RuntimeError) as failure:  # a loop of links, or a name that no file can have
        reason = failure.strerror if isinstance(failure, OSError) else type(failure).__name__
        raise error(f"cannot be opened: {reason}", "image-not-found") from None
    if not is_inside:
        raise error(f"is a link to a file outside the image folder {root}", "image-outside-root")
    if not is_file:
        raise error(f"not found under {root}. Correct the path or pass --images.", "image-not-found")
    return path


def image_size(path: Path) -> tuple[int, int]:
    """Returns the width and the height of an image in pixels, from the header of its file.

    Raises:
        UserError: The file is not an image, or is too large to open safely.
    """
    with _open(path) as image:
        return image.size


def open_image(path: Path, max_side: int | None = None) -> Image.Image:
    """Opens an image as RGB. Of an animation, the first frame is returned.

    Args:
        path: The image file.
        max_side: Maximum length of the longer side in pixels. A larger image is shrunk. A JPEG is decoded at a reduced
            size where that is enough.

    Raises:
        UserError: The file is not an image, is broken or truncated, or is too large to open safely.
    """
    with _open(path) as image:
        try:
            if max_side is None:
                return image.convert("RGB")
            image.draft("RGB", (max_side, max_side))
            shrunk = image.convert("RGB")
            shrunk.thumbnail((max_side, max_side))
            return shrunk
        except Exception as error:  # the decoders raise many types of errors for broken files
            raise UserError(
                f"is a broken image ({type(error).__name__}). Replace the file.", code="invalid-image", file=path
            ) from None


def png_url(image: Image.Image) -> str:
    """Returns an image as a data URL in PNG, the format that every server and browser can read."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _open(path: Path) -> Image.Image:
    from PIL import Image

    try:
        if path.stat().st_size == 0:
            raise UserError("is an empty file. Replace it.", code="invalid-image", file=path)
        image = Image.open(path, formats=FORMATS)
    except UserError:
        raise
    except Image.DecompressionBombError:
        raise UserError(
            f"has more than {MAX_IMAGE_PIXELS} pixels. Resize it.", code="image-too-large", file=path
        ) from None
    except Exception as error:
        formats = ", ".join(FORMATS)
        raise UserError(
            f"is not an image of a supported format ({type(error).__name__}). Convert it to one of {formats}.",
            code="invalid-image",
            file=path,
        ) from None
    width, height = image.size
    problem = None
    if width * height > MAX_IMAGE_PIXELS:
        problem = f"has {width} x {height} pixels, more than {MAX_IMAGE_PIXELS}. Resize it."
    elif max(width, height) > MAX_IMAGE_SIDE:
        problem = f"has {width} x {height} pixels, more than {MAX_IMAGE_SIDE} on a side. Resize it."
    if problem:
        image.close()
        raise UserError(problem, code="image-too-large", file=path)
    if min(width, height) < 1:
        image.close()
        raise UserError("has no pixels. Replace it.", code="invalid-image", file=path)
    return image
