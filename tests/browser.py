"""A headless Chromium, and pages that record everything that a page must not do."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND"),
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Debian's Chromium, driven by Playwright."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs Debian's chromium")
    sync_api = pytest.importorskip("playwright.sync_api")
    home = os.environ.get("HOME")
    os.environ["HOME"] = str(tmp_path_factory.mktemp("home"))
    with sync_api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=chromium, headless=True, args=list(FLAGS))
    if home is not None:
        os.environ["HOME"] = home


def open_page(browser: Any, file: Path, noise: list[str], hash: str = "", **settings: Any) -> Any:
    """Opens a file from disk.

    Args:
        browser: The `browser` fixture.
        file: The page.
        noise: Collects console messages, errors, dialogs, and requests to a network.
        hash: The part of the address after the file, with its ``#``.
        settings: Playwright's settings, such as color_scheme="dark" or viewport={"width": 390, "height": 844}.
    """
    page = browser.new_page(**settings)
    page.on("console", lambda message: noise.append(message.text))
    page.on("pageerror", lambda error: noise.append(str(error)))
    page.on("request", lambda request: noise.append(request.url) if not request.url.startswith("file:") else None)
    page.on("dialog", lambda dialog: noise.append(dialog.message))
    page.goto(file.as_uri() + hash)
    return page


def wait_until(page: Any, condition: str) -> None:
    """Waits until a JavaScript expression is true.

    Playwright's wait_for_function evaluates code in a way that the page's Content-Security-Policy forbids.
    """
    for _ in range(200):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"not true after 10 s: {condition}")
