"""Images that leave the root, exhaust memory, or are not images: each is reported, and the other records are read."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

from helpers import raises_code
from vlm_unlearn.data import images
from vlm_unlearn.data.dataset import UnlearningDataset
from vlm_unlearn.data.formats.table import Columns
from vlm_unlearn.data_tools.check import Checker, DataSource
from vlm_unlearn.data_tools.importers import import_files, import_safe_eraser, import_vlguard
from vlm_unlearn.errors import Problems, UserError


def png(width: int, height: int, rows: bytes = b"") -> bytes:
    """A PNG with a size in its header that need not be that of its pixels, `rows`."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.fixture
def hostile(tmp_path: Path) -> dict[str, str]:
    """The error code of each hostile image, by its path in a record. The folder also contains a valid ``good.png``."""
    folder = tmp_path / "images"
    folder.mkdir()
    outside = tmp_path / "outside.png"
    Image.new("RGB", (8, 8), "red").save(outside)
    Image.new("RGB", (8, 8), "blue").save(folder / "good.png")
    (folder / "link.png").symlink_to(outside)
    (folder / "linked").symlink_to(tmp_path)
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "folder.png").mkdir()
    (folder / "bomb.png").write_bytes(png(30_000, 30_000))
    (folder / "wide.png").write_bytes(png(100_000, 1, b"\0" * 300_001))
    (folder / "huge.png").write_bytes(png(2**31 - 1, 2**31 - 1))
    (folder / "empty.png").write_bytes(b"")
    (folder / "svg.png").write_text('<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"/>')
    (folder / "html.png").write_text("<!doctype html><script>alert(1)</script>")
    (folder / "postscript.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    Image.new("RGB", (64, 64), "green").save(folder / "complete.jpg")
    (folder / "truncated.jpg").write_bytes((folder / "complete.jpg").read_bytes()[:400])
    (folder / "truncated.png").write_bytes(png(64, 64, b"\0" * 50))
    return {
        "../outside.png": "image-outside-root",
        "a/../../outside.png": "image-outside-root",
        "..\\outside.png": "image-outside-root",
        "C:\\outside.png": "image-outside-root",
        str(outside): "image-outside-root",
        "link.png": "image-outside-root",
        "linked/outside.png": "image-outside-root",
        "loop.png": "image-not-found",
        "folder.png": "image-not-found",
        "gone.png": "image-not-found",
        "x" * 5000: "image-not-found",
        "bomb.png": "image-too-large",
        "wide.png": "image-too-large",
        "huge.png": "image-too-large",
        "empty.png": "invalid-image",
        "svg.png": "invalid-image",
        "html.png": "invalid-image",
        "postscript.png": "invalid-image",
        "truncated.jpg": "invalid-image",
        "truncated.png": "invalid-image",
    }


def paths(hostile: dict[str, str]) -> list[str]:
    return ["good.png", *hostile, "good.png"]


def assert_all_reported(hostile: dict[str, str], problems: Problems) -> None:
    assert problems.count == len(hostile)
    reports = list(zip(problems.codes, problems.messages, strict=True))
    for path, code in hostile.items():
        assert any(code == reported and path[:60] in message for reported, message in reports), (path[:60], reports)
    for message in problems.messages:
        assert "\n" not in message
        assert len(message) < 600


def test_import_files_reports_hostile_images(hostile: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [
        {"image": name, "question": f"Q{i}?", "answer": "A.", "set": "forget"} for i, name in enumerate(paths(hostile))
    ]
    rows += [{"image": "good.png", "question": "R?", "answer": "A.", "set": "retain"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    imported = import_files({"": file}, tmp_path / "images", tmp_path / "out", Columns(set="set"))
    assert imported.counts == {"forget": 2, "retain": 1}
    assert_all_reported(hostile, imported.problems)
    assert len(UnlearningDataset.from_folder(tmp_path / "out")["forget"]) == 2
    assert len((tmp_path / "out" / "problems.txt").read_text().splitlines()) == len(hostile)
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["broken_records"] == len(hostile)


def test_import_vlguard_reports_hostile_images(hostile: dict[str, str], tmp_path: Path) -> None:
    records = [
        {"id": str(i), "image": name, "safe": False, "instr-resp": [{"instruction": "Q?", "response": "No."}]}
        for i, name in enumerate(paths(hostile))
    ]
    safe = {"id": "s", "image": "good.png", "safe": True, "instr-resp": [{"safe_instruction": "Q?", "response": "A."}]}
    file = tmp_path / "train.json"
    file.write_text(json.dumps([*records, safe]))
    imported = import_vlguard(file, tmp_path / "images", tmp_path / "out")
    assert imported.counts == {"forget": 2, "retain": 1}
    assert_all_reported(hostile, imported.problems)


def test_import_safe_eraser_reports_hostile_images(hostile: dict[str, str], tmp_path: Path) -> None:
    records = [
        {
            "image_path": name,
            "SDImage_path": "good.png",
            "unsafe_pairs": [{"question": "Q?", "model_response": "H.", "sd_response": "N."}],
            "UnharmPair_text1": {"Question": "W?", "Prediction": "A."},
        }
        for name in paths(hostile)
    ]
    file = tmp_path / "all_train.json"
    file.write_text(json.dumps(records))
    imported = import_safe_eraser(file, tmp_path / "images", tmp_path / "out")
    # The image of each decouple example is valid, but that of its forget example is not, so that both are dropped.
    assert imported.counts["forget"] == 2
    assert imported.counts["retain"] == 2
    pairs = {example.pair_id for example in UnlearningDataset.from_folder(tmp_path / "out")["forget"]}
    assert {example.pair_id for example in UnlearningDataset.from_folder(tmp_path / "out")["decouple"]} == pairs


def test_check_reports_hostile_images(hostile: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(
        "".join(json.dumps({"image": name, "question": "Q?", "answer": "A."}) + "\n" for name in paths(hostile))
    )
    checker = Checker()
    checker.add(DataSource(file, tmp_path / "images"))
    report = checker.report()
    assert_all_reported(hostile, checker.problems)
    assert report["images"]["usable"] == 1
    assert report["errors"]


def test_import_without_valid_images_writes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"image": "gone.png", "question": "Q?", "answer": "A."}\n' * 3)
    with raises_code("no-records", file=tmp_path / "out") as caught:
        import_files({"forget": file, "retain": file}, tmp_path, tmp_path / "out")
    for token in ("forget", "rows.jsonl, record 1", "gone.png", "--images"):
        assert token in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_error_escapes_terminal_codes_in_image_paths(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        images.resolve_image(tmp_path, "\x1b[2J\u202egone.png", "file")
    assert "\x1b" not in str(caught.value)
    assert "\u202e" not in str(caught.value)


def test_images_are_opened_by_content_not_by_suffix(tmp_path: Path) -> None:
    for form in ("PNG", "JPEG", "WEBP", "GIF", "BMP"):
        path = tmp_path / f"{form}.png"
        Image.new("RGB", (12, 10), "red").save(path, format=form)
        assert images.image_size(path) == (12, 10)
        assert images.open_image(path).mode == "RGB"
