"""Opens images: files below an image root, and images in memory or in a `datasets.Dataset`.

Files and bytes come from third parties and are not trusted. `resolve_image` finds a file below an image root.

An image is opened from an `ImageSource`: the path of a file, or an `ImageReference`. `image_reference` makes a
reference from a path, bytes, a PIL image, a numpy array or a ``{"bytes", "path"}`` value of `datasets.Image`.
"""

from __future__ import annotations

import base64
import hashlib
import io
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_unlearn.data.image_paths import FOLLOW_LINKS as FOLLOW_LINKS
from vlm_unlearn.data.image_paths import resolve_image as resolve_image
from vlm_unlearn.data.pixels import PNG_SIGNATURE, displayed_size, exif_orientation, repaired_file, to_rgb
from vlm_unlearn.errors import UserError, quoted
from vlm_unlearn.store import digest_file, digest_text, user_path

if TYPE_CHECKING:
    from PIL import Image

# The formats of published image sets. Formats with an interpreter or an external decoder (EPS, PDF, ...) are never
# tried.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")  # MPO, which some phones write, opens as JPEG
MAX_IMAGE_SIDE = 32_768
MAX_IMAGE_PIXELS = 89_478_485  # Pillow's limit for a decompression bomb: a quarter of a GiB as RGB

# _check_size raises for these images, so that Pillow's warning would only repeat the error.
warnings.filterwarnings("ignore", message="Image size .* could be decompression bomb")


@dataclass(frozen=True)
class ImageReference:
    """An image that is opened when it is used. Two references are equal if their contents are.

    Attributes:
        digest: The SHA-256 of the image file's bytes. For a PIL image or an array: of its mode, size and pixels.
        load: Returns a value that `image_reference` accepts, apart from relative paths.
        name: The path below the image root, or ``sha256:`` and the digest.
    """

    digest: str
    load: Callable[[], Any] = field(compare=False, repr=False)
    name: str = field(compare=False)


ImageSource = Path | ImageReference


def image_size(image: ImageSource) -> tuple[int, int]:
    """Returns the width and the height of `open_image` in pixels, from the header of the image's file.

    Raises:
        UserError: The content is not an image, or is too large to open safely.
    """
    with _opened(image) as opened:
        return displayed_size(opened)


def open_image(image: ImageSource, max_side: int | None = None) -> Image.Image:
    """Opens an image as RGB, with the pixels that image viewers show (see `to_rgb`).

    Training, generation with every backend, `data check` and thumbnails use this function. Of an animation, the first
    frame is returned. A JPEG that lacks its last bytes is opened if its data reaches the last row of blocks.

    Args:
        image: A file, or a reference.
        max_side: Maximum length of the longer side in pixels. A larger image is shrunk. A JPEG is decoded at a reduced
            size where that is enough.

    Raises:
        UserError: The content is not an image, is broken or truncated, or is too large to open safely.
    """
    with _opened(image) as opened:
        try:
            return to_rgb(opened, max_side)
        except Exception as error:  # the decoders raise many types of errors for broken files
            failure = error
    content = image if isinstance(image, Path) else _content(image.load())
    repaired = repaired_file(_read(content)) if isinstance(content, Path | bytes) else None
    if repaired is not None:
        try:
            with _open(repaired) as opened:
                return to_rgb(opened, max_side)
        except Exception as error:
            failure = error
    raise UserError(
        f"is a broken image ({type(failure).__name__}). Replace it.",
        code="invalid-image",
        file=image if isinstance(image, Path) else None,
    )


def llava_image(image: ImageSource) -> ImageReference:
    """Returns a reference to an image that opens with the pixels of LLaVA's own loader.

    The loader ignores the EXIF orientation, drops transparency and clips samples of more than 8 bits. Training and
    evaluation use it with ``image_loader: llava``, to reproduce published numbers.

    Source: ``Image.open(path).convert("RGB")`` in haotian-liu/LLaVA.

    Args:
        image: A file, or a reference.
    """
    name = str(image) if isinstance(image, Path) else image.name
    return ImageReference(digest_text(f"llava {image_key(image)}"), partial(_open_as_llava, image), name)


def _open_as_llava(image: ImageSource) -> Image.Image:
    with _opened(image) as opened:
        try:
            converted = opened.convert("RGB")
        except Exception as error:  # the decoders raise many types of errors for broken files
            raise UserError(
                f"is a broken image ({type(error).__name__}). Replace it.",
                code="invalid-image",
                file=image if isinstance(image, Path) else None,
            ) from None
    converted = converted.copy()
    converted.info = {}  # without EXIF, so that `open_image` does not apply the orientation
    return converted


def _read(content: Path | bytes) -> bytes:
    return content.read_bytes() if isinstance(content, Path) else content


def image_key(image: ImageSource) -> str:
    """Returns a key of an image: of its path for a file of a training-set folder, of its content for a reference."""
    return digest_text(str(image)) if isinstance(image, Path) else image.digest


def png_url(image: Image.Image) -> str:
    """Returns an image as a data URL in PNG, the format that every server and browser can read."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


@contextmanager
def _opened(image: ImageSource) -> Iterator[Image.Image]:
    """Opens an image without decoding it, and closes it if it was opened here."""
    content = image if isinstance(image, Path) else _content(image.load())
    if isinstance(content, Path | bytes):
        with _open(content) as opened:
            yield opened
    else:
        _check_size(content.size, None)
        yield content


def _open(content: Path | bytes) -> Image.Image:
    from PIL import Image

    file = content if isinstance(content, Path) else None
    try:
        if (content.stat().st_size if isinstance(content, Path) else len(content)) == 0:
            raise UserError("is an empty file. Replace it.", code="invalid-image", file=file)
        image = _open_formats(content)
    except UserError:
        raise
    except Image.DecompressionBombError:
        raise UserError(
            f"has more than {MAX_IMAGE_PIXELS} pixels. Resize it.", code="image-too-large", file=file
        ) from None
    except Exception as error:
        formats = ", ".join(FORMATS)
        raise UserError(
            f"is not an image of a supported format ({type(error).__name__}). Convert it to one of {formats}.",
            code="invalid-image",
            file=file,
        ) from None
    try:
        _check_size(image.size, file)
    except UserError:
        image.close()
        raise
    return image


def _open_formats(content: Path | bytes) -> Image.Image:
    from PIL import Image

    try:
        return Image.open(content if isinstance(content, Path) else io.BytesIO(content), formats=FORMATS)
    except Image.DecompressionBombError:
        raise
    except Exception:  # a PNG with more metadata than Pillow reads, among others
        data = _read(content)
        repaired = repaired_file(data) if data.startswith(PNG_SIGNATURE) else None
        if repaired is None:
            raise
        return Image.open(io.BytesIO(repaired), formats=FORMATS)


def _check_size(size: tuple[int, int], file: Path | None) -> None:
    width, height = size
    problem = None
    if width * height > MAX_IMAGE_PIXELS:
        problem = f"has {width} x {height} pixels, more than {MAX_IMAGE_PIXELS}. Resize it."
    elif max(width, height) > MAX_IMAGE_SIDE:
        problem = f"has {width} x {height} pixels, more than {MAX_IMAGE_SIDE} on a side. Resize it."
    if problem:
        raise UserError(problem, code="image-too-large", file=file)
    if min(width, height) < 1:
        raise UserError("has no pixels. Replace it.", code="invalid-image", file=file)


def image_reference(value: Any, root: Path | None = None, load: Callable[[], Any] | None = None) -> ImageReference:
    """Returns a reference to an image that a row of a data set contains. The image is not decoded.

    Args:
        value: A path, the bytes of an image file, a PIL image, a uint8 array [height, width] or [height, width, 3 or
            4], or the ``{"bytes", "path"}`` value of an undecoded `datasets.Image`.
        root: The folder of relative paths. A path must stay inside it. Without a root, paths must be absolute.
        load: Returns the value again when the image is used, so that the reference does not hold its bytes. It must be
            picklable. By default the reference holds `value`.

    Raises:
        UserError: The value is none of these, a path is invalid, or a PIL image is broken or too large.
    """
    if isinstance(value, Mapping):
        value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
    if isinstance(value, str | Path):
        name, path = _locate(value, root)
        digest = digest_file(path)
        return ImageReference(digest, partial(_identity, path), name or f"sha256:{digest}")
    if isinstance(value, bytearray | memoryview):
        value = bytes(value)
    if isinstance(value, bytes):
        digest = hashlib.sha256(value).hexdigest()
    elif _is_array(value) or _is_pil(value):
        image: Image.Image = _array_image(value) if _is_array(value) else value
        _check_size(image.size, None)
        if image is value:
            image = value = _detached(image)
        palette = image.getpalette() or []
        # Pixels with another orientation or transparency are another picture.
        marks = [exif_orientation(image), image.info.get("transparency")]
        marked = "" if marks == [1, None] else f"{marks} "
        digest = hashlib.sha256(f"{image.mode} {image.size} {palette} {marked}".encode() + image.tobytes()).hexdigest()
    else:
        raise UserError(
            f"is a {type(value).__name__}. Pass a path, bytes, a PIL image, or a uint8 array.", code="invalid-field"
        )
    return ImageReference(digest, load or partial(_identity, value), f"sha256:{digest}")


def _locate(value: str | Path, root: Path | None) -> tuple[str | None, Path]:
    """Returns the path of an image below the root, or None without a root, and the file of the image."""
    if isinstance(value, str) and "://" in value:
        problem = f"image {quoted(value)} is a URL. Download it, and pass the file or its bytes."
        raise UserError(problem, code="unsupported-setting")
    name = value if isinstance(value, str) else value.as_posix()
    if root is not None:
        if Path(name).is_absolute() and Path(name).is_relative_to(root):
            name = Path(name).relative_to(root).as_posix()
        return name, resolve_image(root, name)
    path = user_path(value)
    if not path.is_absolute():
        raise UserError(f"image {quoted(name)} is a relative path. Pass its folder as root.", code="missing-root")
    if "\0" in name or not path.is_file():
        raise UserError(f"image {quoted(name)} not found. Correct the path.", code="image-not-found")
    return None, path.resolve()


def _is_pil(value: object) -> bool:
    module = sys.modules.get("PIL.Image")  # a value of this type exists only if the module has been imported
    return module is not None and isinstance(value, module.Image)


def _is_array(value: object) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)


def _content(value: Any) -> Path | bytes | Image.Image:
    """Returns the file, the bytes or the PIL image of an image value, whose type `image_reference` has checked."""
    if isinstance(value, Mapping):
        value = value["bytes"]
    if isinstance(value, bytearray | memoryview):
        return bytes(value)
    content: Path | bytes | Image.Image = _array_image(value) if _is_array(value) else value
    return content


def _array_image(value: Any) -> Image.Image:
    from PIL import Image

    if str(value.dtype) != "uint8" or not (value.ndim == 2 or (value.ndim == 3 and value.shape[2] in (1, 3, 4))):
        raise UserError(
            f"is an array {value.dtype} {list(value.shape)}. Pass uint8 [height, width] or [height, width, channels].",
            code="invalid-field",
        )
    if 0 in value.shape:
        raise UserError("has no pixels. Replace it.", code="invalid-image")
    return Image.fromarray(value[:, :, 0] if value.ndim == 3 and value.shape[2] == 1 else value)


def _detached(image: Image.Image) -> Image.Image:
    """Returns a decoded PIL image without an open file, which processes must not share.

    Raises:
        UserError: The file of the image is broken or closed.
    """
    try:
        image.load()
        return image.copy() if getattr(image, "fp", None) is not None else image
    except Exception as error:  # the decoders raise many types of errors for broken files
        problem = f"is a broken image ({type(error).__name__}). Replace it."
        raise UserError(problem, code="invalid-image") from None


def _identity(value: Any) -> Any:
    return value
