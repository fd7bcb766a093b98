"""A missing image whose file has another spelling or ending is named in the error."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest

from helpers import raises_code
from vlm_unlearn.data.images import resolve_image


@pytest.mark.parametrize(
    ("present", "missing"),
    [
        ("my cat.png", "my%20cat.png"),
        ("b.gif", "b.jpg"),
        ("sub/B.PNG", "sub/b.png"),
        ("sub/b.jpeg", "sub/B.jpg"),
        (unicodedata.normalize("NFC", "café.png"), unicodedata.normalize("NFD", "café.png")),
        (unicodedata.normalize("NFD", "café.png"), unicodedata.normalize("NFC", "café.png")),
        ("100%.png", "100%25.png"),
    ],
)
def test_similar_file_is_named(present: str, missing: str, tmp_path: Path) -> None:
    file = tmp_path / present
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"image")
    with raises_code("image-not-found") as caught:
        resolve_image(tmp_path, missing)
    assert present in str(caught.value)


@pytest.mark.parametrize("missing", ["a.png", "gone/a.png", "%2e%2e/secret.png", "..%2fsecret.png", "x" * 300 + ".png"])
def test_no_hint_for_other_files_or_files_outside(missing: str, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(b"image")
    root = tmp_path / "root"
    root.mkdir()
    (root / "other.png").write_bytes(b"image")
    with raises_code("image-not-found") as caught:
        resolve_image(root, missing)
    assert "Did you mean" not in str(caught.value)


def test_percent_in_the_name_of_a_file_is_kept(tmp_path: Path) -> None:
    (tmp_path / "100%.png").write_bytes(b"image")
    assert resolve_image(tmp_path, "100%.png").name == "100%.png"
