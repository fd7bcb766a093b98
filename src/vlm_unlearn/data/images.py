"""Finds and opens images below a root. Paths come from other people's files, so they never leave the root."""

from __future__ import annotations

from pathlib import Path, PurePosixPath, PureWindowsPath

from PIL import Image

from vlm_unlearn.errors import RequestError


def resolve_image(root: Path, relative: str, where: str) -> Path:
    """The file of an image named by a record.

    Args:
        root: the image root.
        relative: the path the record gives, with forward slashes.
        where: the record, for the error: ``train.json: record 17 ("Ads_333539")``.

    Raises:
        RequestError: the path is absolute, leaves the root (``..`` or a link), or names no file.
    """
    named = f'{where}: image "{relative}"'
    windows = PureWindowsPath(relative)
    parts = PurePosixPath(relative.replace("\\", "/"))
    if "\0" in relative or not relative.strip():
        raise RequestError(f"{where}: image {relative!r} is not a path")
    if parts.is_absolute() or windows.drive or ".." in parts.parts:
        raise RequestError(f"{named} leaves the image folder {root}; paths must be relative and inside it")
    try:
        path = (root / parts).resolve()
        inside = path.is_relative_to(root.resolve())
        found = path.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # a loop of links, a name no file can have
        raise RequestError(f"{where}: image {relative!r}: {error}") from None
    if not inside:
        raise RequestError(f"{named} is a link out of the image folder {root}")
    if not found:
        raise RequestError(f"{named} not found under {root}; pass --images")
    return path


def image_size(path: Path) -> tuple[int, int]:
    """Width and height in pixels, from the file's header.

    Raises:
        RequestError: the file is no image.
    """
    try:
        with Image.open(path) as image:
            return image.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise RequestError(f"{path}: not a readable image ({type(error).__name__})") from None


def open_image(path: Path) -> Image.Image:
    """Opens an image as RGB.

    Raises:
        RequestError: the file is no image, is broken, or is too large to be one.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise RequestError(f"{path}: not a readable image ({type(error).__name__})") from None
