"""Visits to the answers page that record everything that a page must not do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from browser import open_page, wait_until

Open = Callable[..., Any]


@pytest.fixture
def visit(browser: Any) -> Iterator[Open]:
    """Opens a page. At the end of the test, its console and its network log must be empty."""
    noise: list[str] = []
    pages = []

    def visited(file: Path, hash: str = "", **options: Any) -> Any:
        pages.append(open_page(browser, file, noise, hash, **options))
        pages[-1].wait_for_selector("article, .no-match")
        return pages[-1]

    yield visited
    for page in pages:
        page.close()
    assert noise == []


def address(**filters: Any) -> str:
    """Returns the hash of the answers page for some filters. A list of values repeats its name."""
    pairs = (
        (name, value)
        for name, values in filters.items()
        for value in (values if isinstance(values, list) else [values])
    )
    return "#" + "&".join(f"{name}={quote(str(value), safe='')}" for name, value in pairs)


def go(page: Any, hash: str) -> Any:
    """Shows another view of an open answers page, and waits until it is drawn."""
    page.evaluate(f"location.hash = {hash or '#'!r}")
    wait_until(page, "filterHash({ ...filter, page: 1 }) === filterHash({ ...parseFilter(location.hash), page: 1 })")
    wait_until(page, "parseFilter(location.hash).page === filter.page || filter.page === pages()")
    return page
