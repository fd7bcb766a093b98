"""Files in UTF-8 and UTF-16 are read. Other encodings and duplicate keys are errors that name them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers import raises_code
from vlm_unlearn.data.formats.table import Columns, read_table
from vlm_unlearn.data.json_stream import stream
from vlm_unlearn.errors import Problems
from vlm_unlearn.store import decode_text, detect_encoding, read_json

TEXT = '{"caf\u00e9": "\u65e5\u672c"}'


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"]
)
def test_read_json_in_unicode_encodings(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(TEXT.encode(encoding))
    assert read_json(tmp_path / "a.json") == {"caf\u00e9": "\u65e5\u672c"}


@pytest.mark.parametrize(
    ("content", "token"),
    [
        ("caf\u00e9".encode("cp1252"), "Windows-1252"),
        ("na\u00efve \u20ac 5".encode("cp1252"), "Windows-1252"),
        ("\u65e5\u672c".encode("shift-jis"), "8-bit"),
        ("caf\u00e9 ".encode() + b"\xff", "damaged UTF-8"),
        ("\ufeffa".encode("utf-16-le") + b"\x00", "UTF-16"),
    ],
)
def test_decode_text_names_the_encoding(content: bytes, token: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with raises_code("invalid-encoding", file=tmp_path / "a.txt") as caught:
        decode_text(content, tmp_path / "a.txt")
    assert token in str(caught.value)


@pytest.mark.parametrize("head", [b"", b"{", b"{}", b'{"a": 1}', b"[1]"])
def test_detect_encoding_of_short_files(head: bytes) -> None:
    assert detect_encoding(head) == "utf-8"


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', '{"b": [{"a": 1, "a": 1}]}', '{"a": {"c": 1, "c": 2}}'])
def test_read_json_with_a_key_twice_is_rejected(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with raises_code("duplicate-key", file=tmp_path / "a.json"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_stream_record_with_a_key_twice_is_broken(suffix: str, tmp_path: Path) -> None:
    """Only the record is broken. A list can be read on after it."""
    records = ['{"a": 1}', '{"a": {"b": 1, "b": 2}}', '{"a": 3}']
    text = "\n".join(records) if suffix == ".jsonl" else f"[{', '.join(records)}]"
    (tmp_path / f"a{suffix}").write_text(text)
    items = list(stream(tmp_path / f"a{suffix}"))
    assert [item.value for item in items] == [{"a": 1}, None, {"a": 3}]
    assert '"b"' in str(items[1].error)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".json"])
@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "utf-16", "utf-16-le"])
def test_read_table_in_another_encoding_loses_no_row(suffix: str, encoding: str, tmp_path: Path) -> None:
    rows = [{"question": "Q?", "answer": f"a caf\u00e9 {number}"} for number in range(3)]
    texts = {
        ".csv": "question,answer\n" + "".join(f"{row['question']},{row['answer']}\n" for row in rows),
        ".jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
        ".json": json.dumps(rows, ensure_ascii=False),
    }
    (tmp_path / f"t{suffix}").write_bytes(texts[suffix].encode(encoding))
    with raises_code("invalid-encoding") as caught:
        list(read_table(tmp_path / f"t{suffix}", Columns(), None, Problems()))
    assert ("UTF-16" if encoding.startswith("utf") else "Windows-1252") in str(caught.value)


def test_read_table_with_damaged_bytes_reports_their_rows(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes("question,answer\nQ?,caf\u00e9\nQ?,".encode() + b"\xe9\nQ?,tea\n")
    problems = Problems()
    rows = list(read_table(tmp_path / "t.csv", Columns(), None, problems))
    assert [row.example.answer for row in rows] == ["caf\u00e9", "tea"]
    assert problems.codes == ["invalid-encoding"]
