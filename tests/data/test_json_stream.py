"""Files of any size, a record at a time: the same records as json gives, with their places."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from vlm_unlearn.data import json_stream
from vlm_unlearn.data.json_stream import stream, text_at, write_list
from vlm_unlearn.errors import UserError

RECORDS = [
    {"id": i, "text": text * (i % 5), "deep": [{"a": [1, 2.5, None, True]}]}
    for i, text in enumerate(["plain ", "ünï ", "日本 \U0001f600", '"\\/'] * 50)
]


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows that end within records, characters and escapes."""
    monkeypatch.setattr(json_stream, "CHUNK_BYTES", 37)


@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_list_gives_what_json_gives(tmp_path: Path, ascii_only: bool, indent: int | None) -> None:
    file = tmp_path / "a.json"
    text = json.dumps(RECORDS, ensure_ascii=ascii_only, indent=indent)
    file.write_text(f"\ufeff \n{text}\n ", encoding="utf-8")
    items = list(stream(file))
    assert [item.value for item in items] == RECORDS
    assert [item.number for item in items] == list(range(len(RECORDS)))
    with file.open("rb") as handle:
        for item in random.Random(0).sample(items, 20):
            assert json.loads(text_at(handle, item.start, item.end)) == item.value
            handle.seek(0)
            assert handle.read(item.start).count(b"\n") + 1 == item.line


def test_lines_give_what_json_gives(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    lines = [json.dumps(record, ensure_ascii=False) for record in RECORDS]
    file.write_text("\n\n".join(lines), encoding="utf-8")
    items = list(stream(file))
    assert [item.value for item in items] == RECORDS
    assert [item.line for item in items[:3]] == [1, 3, 5]
    with file.open("rb") as handle:
        assert [json.loads(text_at(handle, item.start, item.end)) for item in items] == RECORDS


def test_a_broken_line_is_one_item(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(
        b'{"a": 1}\n{"a": \n{"a": NaN}\n{"a": "\xff"}\n' + b'{"a": ' * 100_000 + b"\n" + b"1" * 5000 + b'\n{"a": 2}'
    )
    items = list(stream(file))
    assert [item.value for item in items] == [{"a": 1}, None, None, None, None, None, {"a": 2}]
    told = [item.error for item in items]
    for place, words in enumerate(
        ("Expecting value", "NaN is not JSON", "not UTF-8", "nested too deeply", "4300 digits"), start=1
    ):
        assert words in str(told[place])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"  \n ", "is empty"),
        (b"hello", "expected a JSON list or JSON lines"),
        (b'[{"a": 1}, {"a": ', "line 1, column 18: record 1 is not JSON"),
        (b'[{"a": 1}', "the file ends; it was cut short"),
        (b'[{"a": 1},\n\n{"a" 1}]', "line 3, column 6: record 1 is not JSON"),
        (b'[{"a": 1} {"a": 2}]', "expected a comma or ] after record 0, found '{'"),
        (b'[{"a": 1},]', "a comma stands before the closing bracket"),
        (b'[{"a": 1}] x', "text after the end of the list"),
        (b"[NaN]", "NaN is not JSON"),
        (b"[Infinity]", "Infinity is not JSON"),
        (b"[" * 200_000, "nested too deeply"),
        (b"[" + b"1" * 5000 + b"]", "4300 digits"),
        (b'["unterminated', "Unterminated string"),
    ],
)
def test_a_broken_list_is_one_clear_error(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(content)
    with pytest.raises(UserError) as error:
        list(stream(file))
    assert message in str(error.value)
    assert str(error.value).startswith(str(file))


def test_a_record_without_end_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "MAX_RECORD_BYTES", 1000)
    file = tmp_path / "a.json"
    file.write_text('["' + "x" * 50_000)
    with pytest.raises(UserError, match="record 0 is not JSON"):
        list(stream(file))
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"a": "' + "x" * 5000 + '"}\n{"a": 1}\n')
    assert [(item.value, item.error) for item in stream(lines)] == [(None, "is longer than 0 MB"), ({"a": 1}, None)]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    assert write_list(file, iter(RECORDS)) == len(RECORDS)
    assert json.loads(file.read_text()) == RECORDS
    assert len(file.read_text().splitlines()) == len(RECORDS) + 2


def test_a_writer_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_list(file, [1])

    def failing() -> object:
        yield 2
        raise UserError("broken")

    with pytest.raises(UserError):
        write_list(file, failing())
    assert json.loads(file.read_text()) == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_plain_is_said_of_plain_records_only(tmp_path: Path, suffix: str) -> None:
    values = ["plain", "\\ backslash \n", "\0", "\ud800", "ünï", "\u202e"]
    for ascii_only in (True, False):
        lines = [json.dumps({"a": value}, ensure_ascii=ascii_only) for value in values for _ in range(20)]
        text = "\n".join(lines) if suffix == ".jsonl" else "[" + ",".join(lines) + "]"
        file = tmp_path / f"a{suffix}"
        file.write_bytes(text.encode("utf-8", "surrogatepass"))
        for item in stream(file):
            said = item.value["a"] if item.value else ""
            assert not item.plain or (said.isascii() and "\0" not in said)
        assert any(item.plain for item in stream(file))
