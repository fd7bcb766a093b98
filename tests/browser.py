"""Debian's Chromium, driven by Playwright."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest

FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync "
    "--host-resolver-rules=MAP\u00a0*\u00a0~NOTFOUND"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs Debian's chromium")
    sync_api = pytest.importorskip("playwright.sync_api")
    home = os.environ.get("HOME")
    os.environ["HOME"] = str(tmp_path_factory.mktemp("home"))
    with sync_api.sync_playwright() as playwright:
        flags = [flag.replace("\u00a0", " ") for flag in FLAGS.split(" ")]
        yield playwright.chromium.launch(executable_path=chromium, headless=True, args=flags)
    if home is not None:
        os.environ["HOME"] = home
