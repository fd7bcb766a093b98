"""The option and the last line that commands share which read image folders."""

from __future__ import annotations

import functools
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer

FOLLOW_LINKS_OPTION = typer.Option(
    False, "--follow-links", help="Follow links out of an image folder. Only for folders that you trust."
)


def reads_images(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the option ``--follow-links`` to a command, and a note about images that are files with another name."""

    @functools.wraps(command)
    def with_option(*args: Any, follow_links: bool = False, **kwargs: Any) -> None:
        with _links_followed(follow_links), _renamed_images_counted():
            command(*args, **kwargs)

    signature = inspect.signature(command)
    option = inspect.Parameter(
        "follow_links", inspect.Parameter.KEYWORD_ONLY, default=FOLLOW_LINKS_OPTION, annotation=bool
    )
    with_option.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*signature.parameters.values(), option]
    )
    with_option.__annotations__ = {**command.__annotations__, "follow_links": bool}
    return with_option


@contextmanager
def _links_followed(follow: bool) -> Iterator[None]:
    """Sets the environment variable within the block, which the processes that load data inherit."""
    from vlm_unlearn.data.image_paths import FOLLOW_LINKS

    earlier = os.environ.get(FOLLOW_LINKS)
    if follow:
        os.environ[FOLLOW_LINKS] = "1"
    try:
        yield
    finally:
        if earlier is not None:
            os.environ[FOLLOW_LINKS] = earlier
        elif follow:
            del os.environ[FOLLOW_LINKS]


@contextmanager
def _renamed_images_counted() -> Iterator[None]:
    """Prints a warning after the block if it has used files for images with another name, also if it fails."""
    from vlm_unlearn.data.image_paths import ImageNameWarning, count_renamed, renamed_note

    with count_renamed() as renamed, warnings.catch_warnings():
        warnings.simplefilter("ignore", ImageNameWarning)
        try:
            yield
        finally:
            if renamed and os.environ.get("RANK", "0") == "0":
                sys.stderr.write(f"warning: {renamed_note(renamed)}\n")
