"""Finds the file of an image that a record names, below an image root. The names come from third parties."""

from __future__ import annotations

import os
import re
import threading
import unicodedata
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NamedTuple
from urllib.parse import unquote

from vlm_unlearn.errors import UserError, quoted
from vlm_unlearn.store import cache_folder

FOLLOW_LINKS = "VLM_UNLEARN_FOLLOW_LINKS"  # the environment variable that lets links leave the image root
# The endings of the formats that `open_image` reads. It goes by the content, so that a wrong ending does not matter.
ENDINGS = frozenset(
    {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"}  # in lower case
)
MAX_ENTRIES = 1_000_000  # entries of a folder that are searched for a file with another spelling
MAX_NAMES = 5  # names that an error lists
UNPACKED = "unpacked"  # the first part of the name of an image that was stored inside a table; it is in the cache
UNPACKED_NAME = re.compile(r"unpacked/[0-9a-f]{32}\.img")

AMBIGUOUS = "have the same name in another spelling or with another ending. Correct the path."

Renamed = dict[tuple[Path, str], PurePosixPath]  # the file that is used for an image, by image root and name

_counters: list[Renamed] = []
_lock = threading.Lock()


class _Matches(NamedTuple):
    """The files below an image root that a missing name may mean."""

    same: list[PurePosixPath]  # the same name in another spelling, or with another ending of an image
    similar: list[PurePosixPath]  # other names that differ in letter case too, or in an unknown ending


def resolve_image(root: Path, relative: str, file: str | Path | None = None, record: str | int | None = None) -> Path:
    """Returns the file of an image that a record names.

    If there is no such file, a file with the same name in another spelling is used: with or without percent encoding,
    in another Unicode normalization, or with another ending of an image. It must be the only one. `count_renamed`
    collects such files. An image that a format has unpacked from a table is in the cache folder instead.

    Args:
        root: The image root.
        relative: The path in the record, with forward slashes, relative to the root. An absolute path below the root is
            accepted too.
        file: The data file that names the image, for the error.
        record: The record that names the image, for the error, such as ``17 (line 203, "Ads_333539")``.

    Raises:
        UserError: The path leaves the root (through ``..`` or a link), is not a file, or may mean several files.
    """

    def error(problem: str, code: str) -> UserError:
        return UserError(f"image {quoted(relative)} {problem}", code=code, file=file, record=record)

    if "\0" in relative or not relative.strip():
        raise error("is not a path", "invalid-field")
    if UNPACKED_NAME.fullmatch(relative) and (cache_folder() / relative).is_file():
        return cache_folder() / relative
    path = _below_root(root, relative)
    if path is None:
        raise error(f"is outside the image folder {root}. Use a relative path inside the folder.", "image-outside-root")
    try:
        target = _target(root, path)
        if not target.is_file():
            matches = _other_names(root, path)
            if len(matches.same) > 1:
                raise error(f"not found under {root}. {_listed(matches.same)} {AMBIGUOUS}", "ambiguous-image")
            if not matches.same:
                hint = "" if not matches.similar else f" Did you mean {quoted(matches.similar[0])}?"
                problem = f"not found under {root}. Correct the path or pass --images.{hint}"
                raise error(problem, "image-not-found")
            target = _target(root, matches.same[0])
            for counter in _counters:
                counter[root, relative] = matches.same[0]
    except _OutsideError:
        raise error(
            f"is a link out of the image folder {root}. If you trust the links in this folder, pass --follow-links or "
            f"set {FOLLOW_LINKS}=1.",
            "image-outside-root",
        ) from None
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError) as failure:  # a loop of links, or a name that no file can have
        reason = failure.strerror if isinstance(failure, OSError) else type(failure).__name__
        raise error(f"cannot be opened: {reason}", "image-not-found") from None
    return target


class ImageNameWarning(UserWarning):
    """Files have been used for images with another name."""


@contextmanager
def count_renamed() -> Iterator[Renamed]:
    """Collects the files that are used within the block for images with another name."""
    renamed: Renamed = {}
    _counters.append(renamed)
    try:
        yield renamed
    finally:
        _counters[:] = [counter for counter in _counters if counter is not renamed]


def renamed_note(renamed: Renamed) -> str:
    """Returns a sentence about files that are used for images with another name."""
    (_, name), file = next(iter(renamed.items()))
    count = len(renamed)
    subject = "1 image is a file" if count == 1 else f"{count:,} images are files"
    return (
        f"{subject} with another spelling or ending of the name, for example {quoted(file)} for {quoted(name)}. "
        "Correct the names if the files are others."
    )


@contextmanager
def renamed_warning() -> Iterator[None]:
    """Warns after the block if files have been used in it for images with another name.

    Warns:
        ImageNameWarning: The number of such images, and one of them.
    """
    with count_renamed() as renamed:
        yield
    if renamed:
        warnings.warn(renamed_note(renamed), ImageNameWarning, stacklevel=4)


class _OutsideError(Exception):
    """A link leads out of the image root."""


def _below_root(root: Path, relative: str) -> PurePosixPath | None:
    """Returns a path relative to the root, or None if it leaves the root."""
    path = PurePosixPath(relative.replace("\\", "/"))
    if ".." in path.parts:
        return None
    if not path.is_absolute() and not PureWindowsPath(relative).drive:
        return path
    absolute = Path(path)
    for folder in (root.absolute(), root.resolve()):
        if absolute.is_absolute() and absolute.is_relative_to(folder):
            return PurePosixPath(absolute.relative_to(folder).as_posix())
    return None


def _target(root: Path, path: PurePosixPath) -> Path:
    """Returns a path below the root with all links resolved. It need not exist.

    Raises:
        _OutsideError: A link leads out of the root, and is not trusted.
    """
    target = (root / path).resolve()
    if not target.is_relative_to(root.resolve()) and not _is_trusted_link(root, target):
        raise _OutsideError
    return target


def _is_trusted_link(root: Path, target: Path) -> bool:
    """Returns whether a link may leave the image root.

    It may if the user allows it, or if it leads from a snapshot to the blobs of the same repository in the cache of the
    Hugging Face hub.
    """
    if os.environ.get(FOLLOW_LINKS, "") not in ("", "0"):
        return True
    folders = root.resolve()
    for folder in (folders, *folders.parents):
        if folder.parent.name == "snapshots":
            return target.is_relative_to(folder.parent.parent / "blobs")
    return False


def _listed(paths: Sequence[PurePosixPath]) -> str:
    more = f" and {len(paths) - MAX_NAMES} more" if len(paths) > MAX_NAMES else ""
    return ", ".join(map(quoted, paths[:MAX_NAMES])) + more


def _other_names(root: Path, missing: PurePosixPath) -> _Matches:
    """Returns the files below the root that a missing path may mean."""
    decoded = PurePosixPath(unquote(missing.as_posix(), errors="surrogateescape"))
    paths = [missing]
    if len(decoded.parts) > len(missing.parts) and ".." not in decoded.parts and not decoded.is_absolute():
        paths.append(decoded)  # with encoded slashes
    matches = _Matches([], [])
    for path in paths:
        folders = [PurePosixPath()]
        for part in path.parts[:-1]:
            folders = [subfolder for folder in folders for subfolder in _same_folders(root, folder, part)]
        for folder in folders:
            in_folder = _same_files(root, folder, path.name)
            matches.same.extend(in_folder.same)
            matches.similar.extend(in_folder.similar)
    return matches


def _same_folders(root: Path, parent: PurePosixPath, name: str) -> list[PurePosixPath]:
    if (root / parent / name).is_dir():
        return [parent / name]
    key = _spelling(name)
    others = (other for other in _similar_entries(root, parent, key) if _spelling(other) == key)
    return [parent / other for other in others if (root / parent / other).is_dir()]


def _same_files(root: Path, folder: PurePosixPath, name: str) -> _Matches:
    key = _spelling(name)
    stem, ending = os.path.splitext(key)
    names = [other for other in _similar_entries(root, folder, key) if (root / folder / other).is_file()]
    same = [other for other in names if _spelling(other) == key]
    if not same and ending.lower() in ENDINGS:
        endings = {other: os.path.splitext(_spelling(other)) for other in names}
        same = [other for other in names if endings[other][0] == stem and endings[other][1].lower() in ENDINGS]
    # Of the others, those with the same ending come first.
    similar = sorted(set(names) - set(same), key=lambda other: (_spelling(other).casefold() != key.casefold(), other))
    return _Matches([folder / other for other in sorted(same)], [folder / other for other in similar])


def _spelling(name: str) -> str:
    """Returns a name that is the same with and without percent encoding, and in all Unicode normalizations."""
    # A name on disk need not be UTF-8. Python then represents its bytes by surrogates.
    return unicodedata.normalize("NFC", unquote(name, errors="surrogateescape"))


def _similar_entries(root: Path, folder: PurePosixPath, spelling: str) -> Sequence[str]:
    """Returns the entries of a folder below the root whose names differ in spelling, letter case or ending only."""
    try:
        resolved = _target(root, folder)
        with _lock:  # threads that check images would each read the folder
            entries = _entries(resolved, resolved.stat().st_mtime_ns)
    except (OSError, ValueError, RuntimeError, _OutsideError):
        return ()
    return entries.get(os.path.splitext(spelling)[0].casefold(), ())


@lru_cache(maxsize=16)
def _entries(folder: Path, modified: int) -> Mapping[str, Sequence[str]]:
    """Returns the names in a folder by their stem, without differences in spelling and letter case.

    Args:
        folder: The folder.
        modified: The time of its last change, so that a changed folder is read again.
    """
    entries: dict[str, list[str]] = {}
    with os.scandir(folder) as iterator:
        for number, entry in enumerate(iterator):
            if number >= MAX_ENTRIES:
                return {}  # among the others there may be a second match
            entries.setdefault(os.path.splitext(_spelling(entry.name))[0].casefold(), []).append(entry.name)
    return entries
