"""Folders: the cache, locks, and folders that appear only once they are complete."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from vlm_unlearn.errors import UserError
from vlm_unlearn.store.files import user_path


def cache_folder() -> Path:
    """Returns the folder for reference values, image features, replies of judges and the demo's base models.

    It is ``$VLM_UNLEARN_CACHE``, or by default the platform's cache folder.
    """
    from platformdirs import user_cache_path

    configured = os.environ.get("VLM_UNLEARN_CACHE")
    return user_path(configured) if configured else user_cache_path("vlm-unlearn")


@contextmanager
def lock_folder(path: Path) -> Iterator[None]:
    """Creates a folder and locks it for this process during the block.

    The operating system releases the lock of a killed process.

    Raises:
        UserError: Another process has locked the folder, or the folder cannot be created.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{error.strerror}. Choose another output folder.", code="output-not-writable", file=path
        ) from None
    try:
        with FileLock(path / ".lock", timeout=0):
            yield
    except Timeout:
        raise UserError("another process is using this folder", code="run-locked", file=path) from None


@contextmanager
def build_atomically(path: Path) -> Iterator[Path | None]:
    """Builds the folder `path` at most once, safe with several processes and after a kill at any moment.

    Other processes wait for the one that builds.

    Yields:
        An empty temporary folder to fill, which becomes `path` when the block ends without an error. None if `path`
        exists already.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if path.exists():
            yield None
            return
        temporary = path.with_name(f"{path.name}.part")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        os.replace(temporary, path)
