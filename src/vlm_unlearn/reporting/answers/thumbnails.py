"""Writes small copies of the questions' images for the answers page."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from vlm_unlearn.data.image_edits import edited_image, edits_key
from vlm_unlearn.data.images import ImageSource, image_size, open_image, resolve_image
from vlm_unlearn.data.pixels import DECODER_VERSION
from vlm_unlearn.data_tools.parallel import map_in_threads
from vlm_unlearn.errors import UserError
from vlm_unlearn.records import ImageEdit
from vlm_unlearn.store import digest_file, digest_text

MAX_IMAGE_SIDE = 320  # pixels
# The image root, a record's path below it, and the edits of the image.
ImageReference = tuple[Path | None, str, tuple[ImageEdit, ...]]


@dataclass(frozen=True)
class Thumbnail:
    """A thumbnail, or the reason why there is none.

    Args:
        file: The name of the thumbnail's file, or an empty string.
        width: Its width in pixels.
        height: Its height in pixels.
        problem: Why the image cannot be shown, or an empty string.
    """

    file: str = ""
    width: int = 0
    height: int = 0
    problem: str = ""


def write_thumbnails(
    image_dir: Path, images: Iterable[ImageReference], on_done: Callable[[int, int], None] | None = None
) -> dict[ImageReference, Thumbnail]:
    """Writes a thumbnail of each image. The image is decoded and encoded again, so no byte of the source is copied.

    The digest of the source, its edits and the decoder's version is the thumbnail's name. Identical images therefore
    share a thumbnail, and an existing thumbnail is used again.

    Args:
        image_dir: The folder to write to.
        images: The images. Duplicates are ignored.
        on_done: Called with the number of finished images and their total.

    Returns:
        The thumbnail of each image. One of a missing or invalid image has a `problem` instead of a file.
    """
    image_dir.mkdir(parents=True, exist_ok=True)
    resolved = {image: _resolve(image[0], image[1]) for image in dict.fromkeys(images)}
    paths = dict.fromkeys(path for path in resolved.values() if isinstance(path, Path))
    digests = dict(map_in_threads(_digest, list(paths)))
    keys = {
        image: _thumbnail_key(digest, image[2])
        for image, path in resolved.items()
        if isinstance(path, Path) and (digest := digests[path]) is not None
    }
    source_by_key = {key: edited_image(Path(resolved[image]), image[2]) for image, key in reversed(keys.items())}
    thumbnails = dict(
        map_in_threads(
            lambda key: _write_thumbnail(image_dir, key, source_by_key[key]),
            list(source_by_key),
            on_done,
        )
    )
    return {image: _thumbnail(path, keys.get(image), thumbnails) for image, path in resolved.items()}


def _resolve(root: Path | None, relative: str) -> Path | str:
    """Returns the path of an image, or why it cannot be shown."""
    if root is None:
        return "the run's suite names no image folder for it"
    if root.resolve() == Path(root.resolve().anchor):
        return "the run's suite names the root of the file system as its image folder"
    try:
        return resolve_image(root, relative)
    except UserError as error:
        return str(error)


def _digest(path: Path) -> str | None:
    try:
        return digest_text(f"{DECODER_VERSION} {digest_file(path)}")[:32]
    except OSError:
        return None


def _thumbnail_key(digest: str, edits: tuple[ImageEdit, ...]) -> str:
    return digest_text(f"{digest} {edits_key(edits)}")[:32] if edits else digest


def _thumbnail(path: Path | str, key: str | None, thumbnails: Mapping[str, Thumbnail]) -> Thumbnail:
    if isinstance(path, str):
        return Thumbnail(problem=path)
    return Thumbnail(problem=f"{path}: cannot be read") if key is None else thumbnails[key]


def _write_thumbnail(image_dir: Path, key: str, source: ImageSource) -> Thumbnail:
    for existing in (image_dir / f"{key}.png", image_dir / f"{key}.jpg"):
        if existing.is_file():
            with suppress(UserError):  # a damaged thumbnail is written again
                return Thumbnail(existing.name, *image_size(existing))
    try:
        image = open_image(source, MAX_IMAGE_SIDE)
    except UserError as error:
        return Thumbnail(problem=str(error))
    few_colors = image.getcolors(64) is not None  # drawings are smaller and sharper as PNG, photographs as JPEG
    file = image_dir / f"{key}.{'png' if few_colors else 'jpg'}"
    image.info.clear()  # Pillow would copy the source's comment and color profile
    temporary = file.with_name(f".{file.name}.part")
    image.save(temporary, format="PNG" if few_colors else "JPEG", quality=80)
    os.replace(temporary, file)
    return Thumbnail(file.name, *image.size)


def delete_stale_thumbnails(image_dir: Path, used: Iterable[Thumbnail]) -> None:
    """Deletes the thumbnails that the page no longer uses, and temporary files of killed processes.

    Args:
        image_dir: The folder of the thumbnails. Files with other names stay.
        used: The thumbnails of the current page.
    """
    names = {thumbnail.file for thumbnail in used}
    for file in image_dir.iterdir():
        if (
            re.fullmatch(r"[0-9a-f]{32}\.(png|jpg)|\.[0-9a-f]{32}\.(png|jpg)\.part", file.name)
            and file.name not in names
        ):
            file.unlink()
