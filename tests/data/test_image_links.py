"""Links to images stay inside the image root, unless the hub's cache made them or the user allows them."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers import raises_code
from vlm_unlearn.data.images import FOLLOW_LINKS, resolve_image


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """An image root with a link to a file and a link to a folder outside of it."""
    outside, root = tmp_path / "coco", tmp_path / "images"
    outside.mkdir()
    root.mkdir()
    (outside / "a.png").write_bytes(b"image")
    (root / "file.png").symlink_to(outside / "a.png")
    (root / "coco").symlink_to(outside)
    return root


@pytest.mark.parametrize("name", ["file.png", "coco/a.png"])
def test_link_out_of_the_root_needs_the_switch(linked: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("", "0"):
        monkeypatch.setenv(FOLLOW_LINKS, value)
        with raises_code("image-outside-root") as caught:
            resolve_image(linked, name)
    assert FOLLOW_LINKS in str(caught.value)
    monkeypatch.setenv(FOLLOW_LINKS, "1")
    assert resolve_image(linked, name).read_bytes() == b"image"
    with raises_code("image-outside-root"):
        resolve_image(linked, "../coco/a.png")  # a path is not a link


def test_links_of_a_hub_snapshot_lead_to_its_own_blobs_only(tmp_path: Path) -> None:
    repository, other = tmp_path / "datasets--a--b", tmp_path / "datasets--c--d"
    snapshot = repository / "snapshots" / "abc" / "train"
    snapshot.mkdir(parents=True)
    for folder in (repository, other):
        (folder / "blobs").mkdir(parents=True)
        (folder / "blobs" / "1").write_bytes(b"image")
    (snapshot / "good.png").symlink_to("../../../blobs/1")
    (snapshot / "bad.png").symlink_to(other / "blobs" / "1")
    (snapshot / "worse.png").symlink_to("/etc/hostname")
    assert resolve_image(snapshot, "good.png").read_bytes() == b"image"
    for name in ("bad.png", "worse.png"):
        with raises_code("image-outside-root"):
            resolve_image(snapshot, name)
