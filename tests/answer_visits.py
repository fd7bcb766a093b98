"""Visits to the page of all answers that take note of everything a page shouldn't do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from browser import open_page

Open = Callable[..., Any]


@pytest.fixture
def visit(browser: Any) -> Iterator[Open]:
    """Opens a page; when the test ends, nothing may have stood in its console or gone to any host."""
    noise: list[str] = []
    opened = []

    def visited(file: Path, hash: str = "", **options: Any) -> Any:
        opened.append(open_page(browser, file, noise, hash, **options))
        opened[-1].wait_for_selector("article, .nothing")
        return opened[-1]

    yield visited
    for page in opened:
        page.close()
    assert noise == []


def address(**wanted: Any) -> str:
    """A name with a list of values stands there once for each."""
    pairs = (
        (name, value) for name, values in wanted.items() for value in (values if isinstance(values, list) else [values])
    )
    return "#" + "&".join(f"{name}={quote(str(value), safe='')}" for name, value in pairs)
