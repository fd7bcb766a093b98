"""A headless Chromium, and pages that take note of everything they shouldn't do."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Debian's chromium, driven by Playwright."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs Debian's chromium")
    sync_api = pytest.importorskip("playwright.sync_api")
    home = os.environ.get("HOME")
    os.environ["HOME"] = str(tmp_path_factory.mktemp("home"))
    with sync_api.sync_playwright() as playwright:
        yield playwright.chromium.launch(
            executable_path=chromium, headless=True, args=[*FLAGS.split(), "--host-resolver-rules=MAP * ~NOTFOUND"]
        )
    if home is not None:
        os.environ["HOME"] = home


def open_page(browser: Any, file: Path, noise: list[str], hash: str = "", **settings: Any) -> Any:
    """Opens a file from disk; `noise` takes what it says on the console, its errors and dialogs, and what it asks of any host.

    Args:
        settings: Playwright's, such as color_scheme="dark" or viewport={"width": 390, "height": 844}.
    """
    page = browser.new_page(**settings)
    page.on("console", lambda message: noise.append(message.text))
    page.on("pageerror", lambda error: noise.append(str(error)))
    page.on("request", lambda request: noise.append(request.url) if not request.url.startswith("file:") else None)
    page.on("dialog", lambda dialog: noise.append(dialog.message))
    page.goto(file.as_uri() + hash)
    return page


def wait_until(page: Any, true: str) -> None:
    """Waits until a JavaScript expression is true; Playwright's own way evaluates in the page, which its policy forbids."""
    for _ in range(200):
        if page.evaluate(true):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"never came true: {true}")
