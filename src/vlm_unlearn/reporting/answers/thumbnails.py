"""Small copies of the images that questions are about, to look at in a page."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from vlm_unlearn.data.images import image_size, open_image, resolve_image
from vlm_unlearn.data.parallel import map_in_threads
from vlm_unlearn.errors import UserError
from vlm_unlearn.store import digest_file

MAX_IMAGE_SIDE = 320  # pixels
Source = tuple[Path | None, str]  # image root, and the path below it that a record gives
OnDone = Callable[[int, int], None]


@dataclass(frozen=True)
class Picture:
    """A thumbnail, or why there is none."""

    file: str = ""  # its name
    width: int = 0
    height: int = 0
    problem: str = ""


def write_thumbnails(folder: Path, sources: Iterable[Source], on_done: OnDone | None = None) -> dict[Source, Picture]:
    """Writes a thumbnail of each image into a folder of its own, decoded and encoded anew: no byte of the source is copied.

    A file is named by the digest of its source, so that the same image is there once, and one that is there is not made again. An
    image that is missing, broken or outside its root has a `problem`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = {source: _resolved(*source) for source in dict.fromkeys(sources)}
    paths = dict.fromkeys(path for path in found.values() if isinstance(path, Path))
    digests = dict(map_in_threads(_digest, list(paths)))
    first = {digest: path for path, digest in reversed(digests.items()) if digest is not None}
    made = dict(map_in_threads(lambda digest: _thumbnail(folder, digest, first[digest]), list(first), on_done))
    return {source: _picture(path, digests, made) for source, path in found.items()}


def _resolved(root: Path | None, relative: str) -> Path | str:
    """The image's file, or what is wrong with it."""
    if root is None:
        return "the run's suite names no folder of images for it"
    if root.resolve() == Path(root.resolve().anchor):
        return "the run's suite names the whole disk as its folder of images"
    try:
        return resolve_image(root, relative)
    except UserError as error:
        return str(error)


def _digest(path: Path) -> str | None:
    try:
        return digest_file(path)[:32]
    except OSError:  # nobody may read it: opening it says so
        return None


def _picture(path: Path | str, digests: Mapping[Path, str | None], made: Mapping[str, Picture]) -> Picture:
    if isinstance(path, str):
        return Picture(problem=path)
    digest = digests[path]
    return Picture(problem=f"{path}: can't be read") if digest is None else made[digest]


def _thumbnail(folder: Path, digest: str, source: Path) -> Picture:
    for known in (folder / f"{digest}.png", folder / f"{digest}.jpg"):
        if known.is_file():
            with suppress(UserError):  # one that was damaged is made anew
                return Picture(known.name, *image_size(known))
    try:
        image = open_image(source, MAX_IMAGE_SIDE)
    except UserError as error:
        return Picture(problem=str(error))
    drawn = image.getcolors(64) is not None  # a drawing is smaller and cleaner as PNG, a photograph as JPEG
    file = folder / f"{digest}.{'png' if drawn else 'jpg'}"
    _save(image, file, "PNG" if drawn else "JPEG")
    return Picture(file.name, *image.size)


def _save(image: Image.Image, file: Path, format: str) -> None:
    image.info.clear()  # Pillow would write the source's comment and colour profile into the copy
    part = file.with_name(f".{file.name}.part")
    image.save(part, format=format, quality=80)
    os.replace(part, file)


def delete_other_thumbnails(folder: Path, kept: Iterable[Picture]) -> None:
    """Deletes the thumbnails of an earlier page that this one doesn't show, and what a kill left; files of other names are not ours."""
    wanted = {picture.file for picture in kept}
    for file in folder.iterdir():
        if (
            re.fullmatch(r"[0-9a-f]{32}\.(png|jpg)|\.[0-9a-f]{32}\.(png|jpg)\.part", file.name)
            and file.name not in wanted
        ):
            file.unlink()
