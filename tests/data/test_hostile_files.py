"""Files that try to get out, to fill memory, or to be something else: each is refused by name, and the rest goes on."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

from vlm_unlearn.data import images
from vlm_unlearn.data.check import Checker, DataSource
from vlm_unlearn.data.importers import import_files, import_safe_eraser, import_vlguard
from vlm_unlearn.data.training_set import read_training_set
from vlm_unlearn.errors import UserError


def png(width: int, height: int, rows: bytes = b"") -> bytes:
    """A PNG whose header claims a size; its pixels are whatever `rows` holds."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.fixture
def hostile(tmp_path: Path) -> dict[str, str]:
    """Image path as a record names it -> a part of the message that refuses it. ``good.png`` stands among them."""
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
    Image.new("RGB", (64, 64), "green").save(folder / "whole.jpg")
    (folder / "cut.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:400])
    (folder / "cut.png").write_bytes(png(64, 64, b"\0" * 50))
    return {
        "../outside.png": "leaves the image folder",
        "a/../../outside.png": "leaves the image folder",
        "..\\outside.png": "leaves the image folder",
        "C:\\outside.png": "leaves the image folder",
        str(outside): "leaves the image folder",
        "link.png": "is a link out of the image folder",
        "linked/outside.png": "is a link out of the image folder",
        "loop.png": "loop.png",
        "folder.png": "not found",
        "gone.png": "not found",
        "x" * 5000: "File name too long",
        "bomb.png": "pixels",
        "wide.png": "a side longer than",
        "huge.png": "pixels",
        "empty.png": "is an empty file",
        "svg.png": "is not an image of a known format",
        "html.png": "is not an image of a known format",
        "postscript.png": "is not an image of a known format",
        "cut.jpg": "is a broken image",
        "cut.png": "is a broken image",
    }


def names(hostile: dict[str, str]) -> list[str]:
    return ["good.png", *hostile, "good.png"]


def all_are_listed(hostile: dict[str, str], messages: list[str]) -> None:
    assert len(messages) == len(hostile)
    for name, words in hostile.items():
        named = [message for message in messages if words in message]
        assert named, f"{name[:40]}: nobody says {words!r}: {messages}"
    for message in messages:
        assert "\n" not in message
        assert len(message) < 600


def test_import_table(hostile: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [
        {"image": name, "question": f"Q{i}?", "answer": "A.", "set": "forget"} for i, name in enumerate(names(hostile))
    ]
    rows += [{"image": "good.png", "question": "R?", "answer": "A.", "set": "retain"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    from vlm_unlearn.data.formats.table import Columns

    imported = import_files({"": file}, tmp_path / "images", tmp_path / "out", Columns(set="set"))
    assert imported.counts == {"forget": 2, "retain": 1}
    all_are_listed(hostile, imported.problems.messages)
    assert len(read_training_set(tmp_path / "out").examples["forget"]) == 2
    assert len((tmp_path / "out" / "problems.txt").read_text().splitlines()) == len(hostile)
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["broken_records"] == len(hostile)


def test_import_vlguard(hostile: dict[str, str], tmp_path: Path) -> None:
    records = [
        {"id": str(i), "image": name, "safe": False, "instr-resp": [{"instruction": "Q?", "response": "No."}]}
        for i, name in enumerate(names(hostile))
    ]
    safe = {"id": "s", "image": "good.png", "safe": True, "instr-resp": [{"safe_instruction": "Q?", "response": "A."}]}
    file = tmp_path / "train.json"
    file.write_text(json.dumps([*records, safe]))
    imported = import_vlguard(file, tmp_path / "images", tmp_path / "out")
    assert imported.counts == {"forget": 2, "retain": 1}
    all_are_listed(hostile, imported.problems.messages)


def test_import_safe_eraser(hostile: dict[str, str], tmp_path: Path) -> None:
    records = [
        {
            "image_path": name,
            "SDImage_path": "good.png",
            "unsafe_pairs": [{"question": "Q?", "model_response": "H.", "sd_response": "N."}],
            "UnharmPair_text1": {"Question": "W?", "Prediction": "A."},
        }
        for name in names(hostile)
    ]
    file = tmp_path / "all_train.json"
    file.write_text(json.dumps(records))
    imported = import_safe_eraser(file, tmp_path / "images", tmp_path / "out")
    # A decouple example stays, as its own image is good: but its forget example is gone, so that nothing pairs with it.
    assert imported.counts["forget"] == 2
    assert imported.counts["retain"] == 2
    pairs = {example.pair_id for example in read_training_set(tmp_path / "out").examples["forget"]}
    assert {example.pair_id for example in read_training_set(tmp_path / "out").examples["decouple"]} == pairs


def test_check(hostile: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(
        "".join(json.dumps({"image": name, "question": "Q?", "answer": "A."}) + "\n" for name in names(hostile))
    )
    checker = Checker()
    checker.add(DataSource(file, tmp_path / "images"))
    report = checker.report()
    all_are_listed(hostile, checker.problems.messages)
    assert report["images"]["usable"] == 1
    assert report["errors"]


def test_every_image_broken_writes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"image": "gone.png", "question": "Q?", "answer": "A."}\n' * 3)
    with pytest.raises(
        UserError,
        match=r"the forget set is empty; nothing was written; .*rows\.jsonl: record 0.*the image folder \(--images\)",
    ):
        import_files({"forget": file, "retain": file}, tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_terminal_codes_in_names_do_not_reach_the_terminal(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        images.resolve_image(tmp_path, "\x1b[2J\u202egone.png", "file")
    assert "\x1b" not in str(error.value)
    assert "\u202e" not in str(error.value)


def test_common_formats_are_read_whatever_their_ending(tmp_path: Path) -> None:
    for form in ("PNG", "JPEG", "WEBP", "GIF", "BMP"):
        path = tmp_path / f"{form}.png"
        Image.new("RGB", (12, 10), "red").save(path, format=form)
        assert images.image_size(path) == (12, 10)
        assert images.open_image(path).mode == "RGB"
