"""Visits to the page of all answers that take note of everything a page shouldn't do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

Open = Callable[..., Any]


@pytest.fixture
def visit(browser: Any) -> Iterator[Open]:
    """Opens a page; when the test ends, nothing may have stood in its console or gone to any host."""
    noise: list[str] = []
    opened = []

    def open_page(file: Path, hash: str = "", **options: Any) -> Any:
        page = browser.new_page(**options)
        opened.append(page)
        page.on("console", lambda message: noise.append(message.text))
        page.on("pageerror", lambda error: noise.append(str(error)))
        page.on("request", lambda request: noise.append(request.url) if not request.url.startswith("file:") else None)
        page.on("dialog", lambda dialog: noise.append(dialog.message))
        page.goto(file.as_uri() + hash)
        page.wait_for_selector("article, .nothing")
        return page

    yield open_page
    for page in opened:
        page.close()
    assert noise == []


def until(page: Any, condition: str) -> None:
    """Waits for a condition; Playwright's own way evaluates it within the page, whose policy forbids that."""
    for _ in range(100):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(50)
    raise AssertionError(condition)


def address(**wanted: Any) -> str:
    """A name with a list of values stands there once for each."""
    pairs = ((name, value) for name, values in wanted.items() for value in (values if isinstance(values, list) else [values]))
    return "#" + "&".join(f"{name}={quote(str(value), safe='')}" for name, value in pairs)
