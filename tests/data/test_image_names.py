"""A missing image whose only neighbor of that name has another spelling or ending is that neighbor."""

from __future__ import annotations

import json
import os
import time
import unicodedata
from pathlib import Path
from unittest.mock import patch

import pytest
from PIL import Image

from helpers import raises_code, run_in_process
from vlm_unlearn.data import image_paths
from vlm_unlearn.data.dataset import UnlearningDataset
from vlm_unlearn.data.image_paths import ImageNameWarning, count_renamed, resolve_image
from vlm_unlearn.evaluation.rows import read_rows

COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


def put(root: Path, name: str) -> Path:
    file = root / name
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(file, format="PNG")
    return file


@pytest.mark.parametrize(
    ("present", "missing"),
    [
        ("my cat.png", "my%20cat.png"),
        ("my%20cat.png", "my cat.png"),
        ("100%.png", "100%25.png"),
        ("sub/a.png", "sub%2Fa.png"),
        (f"{COMPOSED}.png", f"{DECOMPOSED}.png"),
        (f"{DECOMPOSED}.png", f"{COMPOSED}.png"),
        (f"{DECOMPOSED}/my cat.png", f"{COMPOSED}/my%20cat.png"),
        ("caf\udce9.png", "caf%E9.png"),
        ("b.jpeg", "b.jpg"),
        ("b.JPG", "b.jpg"),
        ("sub/b.gif", "sub/b.jpg"),
        (f"{COMPOSED} 1.webp", f"{DECOMPOSED}%201.PNG"),
    ],
    ids=ascii,
)
def test_only_neighbor_of_the_name_is_used(present: str, missing: str, tmp_path: Path) -> None:
    file = put(tmp_path, present)
    for name in ("other.png", "sub/other.jpg", "b.txt", "bb.jpg"):
        put(tmp_path, name)
    with count_renamed() as renamed:
        assert resolve_image(tmp_path, missing) == resolve_image(tmp_path, present) == file
    assert {name: other.as_posix() for (_, name), other in renamed.items()} == {missing: present}


@pytest.mark.parametrize(
    ("present", "missing"),
    [
        (["b.jpeg", "b.png"], "b.jpg"),
        (["b.JPG", "b.jpeg", "b.webp"], "b.jpg"),
        ([f"{COMPOSED}.png", f"{DECOMPOSED}.png"], "caf%C3%A9.png"),
        (["my cat.png", "my%20cat.png"], "my%20c%61t.png"),
        ([f"{COMPOSED}/a.png", f"{DECOMPOSED}/a.png"], "caf%C3%A9/a.png"),
    ],
    ids=ascii,
)
def test_several_neighbors_are_named(present: list[str], missing: str, tmp_path: Path) -> None:
    for name in present:
        put(tmp_path, name)
    with raises_code("ambiguous-image") as caught:
        resolve_image(tmp_path, missing)
    for name in present:
        assert name in str(caught.value)


def test_file_of_the_very_name_comes_first(tmp_path: Path) -> None:
    for name in ("b.png", "b.jpg", "100%25.png", "100%.png"):
        put(tmp_path, name)
    for name in ("b.png", "100%25.png", "100%.png"):
        assert resolve_image(tmp_path, name) == tmp_path / name
    (tmp_path / "b.png").unlink()
    assert resolve_image(tmp_path, "b.png") == tmp_path / "b.jpg"
    put(tmp_path, "b.png")
    assert resolve_image(tmp_path, "b.png") == tmp_path / "b.png"


@pytest.mark.parametrize(
    ("present", "missing"),
    [("sub/B.PNG", "sub/b.png"), ("sub/b.jpeg", "sub/B.jpg"), ("b.jpg", "b.txt")],
)
def test_other_similar_file_is_only_named(present: str, missing: str, tmp_path: Path) -> None:
    put(tmp_path, present)
    with raises_code("image-not-found") as caught:
        resolve_image(tmp_path, missing)
    assert present in str(caught.value)


@pytest.mark.parametrize(
    "missing",
    ["a.png", "gone/a.png", "%2e%2e/secret.png", "..%2fsecret.png", "%2Fetc%2Fhostname", "x" * 300 + ".png", "%00.png"],
)
def test_no_other_file_is_used_or_named(missing: str, tmp_path: Path) -> None:
    put(tmp_path, "secret.png")
    put(tmp_path / "root", "other.png")
    with raises_code("image-not-found") as caught:
        resolve_image(tmp_path / "root", missing)
    assert "Did you mean" not in str(caught.value)


@pytest.mark.parametrize("missing", ["linked/my%20cat.png", "my%20link.png"])
def test_other_spelling_does_not_lead_out_of_the_root(missing: str, tmp_path: Path) -> None:
    outside, root = put(tmp_path, "outside/my cat.png"), tmp_path / "root"
    root.mkdir()
    (root / "linked").symlink_to(outside.parent)
    (root / "my link.png").symlink_to(outside)
    with raises_code("image-outside-root") as caught:
        resolve_image(root, missing)
    assert "my cat" not in str(caught.value)


def test_absolute_path_below_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = put(tmp_path, "real/sub/a.png")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "real")
    monkeypatch.chdir(tmp_path)
    for root in (tmp_path / "real", link, Path("real"), Path("link")):
        assert resolve_image(root, str(file)) == file
        assert resolve_image(root, str(file).replace("a.png", "%61.png")) == file
    assert resolve_image(link, str(link / "sub" / "a.png")) == file
    outside = put(tmp_path, "outside.png")
    for name in (str(outside), str(tmp_path / "real" / ".." / "outside.png"), "C:\\real\\a.png"):
        with raises_code("image-outside-root"):
            resolve_image(tmp_path / "real", name)


def test_folder_is_listed_once_and_only_after_a_miss(tmp_path: Path) -> None:
    for number in range(300):
        put(tmp_path, f"my {number}.png")
    with patch.object(image_paths.os, "scandir", side_effect=os.scandir) as scandir:
        for number in range(300):
            resolve_image(tmp_path, f"my {number}.png")
        assert scandir.call_count == 0
        for number in range(300):
            resolve_image(tmp_path, f"my%20{number}.png")
        assert scandir.call_count == 1
    time.sleep(0.02)  # the resolution of the time of a change
    put(tmp_path, "new one.png")
    assert resolve_image(tmp_path, "new%20one.png") == tmp_path / "new one.png"


def test_rows_in_memory_warn_once_with_the_count(tmp_path: Path) -> None:
    for name in ("a b.png", "c.jpeg"):
        put(tmp_path, name)
    rows = [{"image": name, "question": "What?", "answer": "Red."} for name in ("a%20b.png", "c.png")]
    with pytest.warns(ImageNameWarning) as caught:
        UnlearningDataset.from_datasets({"forget": rows, "retain": rows}, root=tmp_path)
    assert len(caught) == 1
    assert "2 images" in str(caught[0].message)
    with pytest.warns(ImageNameWarning):
        read_rows([{**rows[0], "image": "%61 b.png"}], tmp_path)


def test_commands_count_the_images_in_their_last_line(tmp_path: Path) -> None:
    for name in ("my cat.png", "b.jpeg", "c.png"):
        put(tmp_path / "images", name)
    rows = [
        {"image": name, "question": f"What is {number}?", "answer": "Red.", "set": ("forget", "retain")[number % 2]}
        for number, name in enumerate(["my%20cat.png", "b.jpg", "c.png", "my%20cat.png"])
    ]
    table = tmp_path / "rows.jsonl"
    table.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    images = ("--images", tmp_path / "images")
    for arguments in (
        ("data", "import", "files", table, *images, "--out", tmp_path / "set"),
        ("data", "check", table, *images),
    ):
        done = run_in_process(*arguments)
        assert done.returncode == 0, done.stderr
        last = done.stderr.splitlines()[-1]
        assert last.startswith("warning: 2 images")
        assert "my%20cat.png" in last
    assert run_in_process("data", "check", tmp_path / "set").returncode == 0
