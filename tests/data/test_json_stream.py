"""The streamed records are those of the json module, with correct positions."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from helpers import raises_code
from vlm_unlearn.data import json_stream
from vlm_unlearn.data.json_stream import members, stream, text_at, write_list
from vlm_unlearn.errors import UserError

RECORDS = [
    {"id": i, "text": text * (i % 5), "deep": [{"a": [1, 2.5, None, True]}]}
    for i, text in enumerate(["plain ", "ünï ", "日本 \U0001f600", '"\\/'] * 50)
]


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small windows end within records, characters and escape sequences."""
    monkeypatch.setattr(json_stream, "CHUNK_BYTES", 37)


@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("indent", [None, 2])
def test_stream_list_equals_json_module(tmp_path: Path, ascii_only: bool, indent: int | None) -> None:
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


def test_stream_lines_equals_json_module(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    lines = [json.dumps(record, ensure_ascii=False) for record in RECORDS]
    file.write_text("\n\n".join(lines), encoding="utf-8")
    items = list(stream(file))
    assert [item.value for item in items] == RECORDS
    assert [item.line for item in items[:3]] == [1, 3, 5]
    with file.open("rb") as handle:
        assert [json.loads(text_at(handle, item.start, item.end)) for item in items] == RECORDS


def test_stream_broken_line_becomes_item_with_error(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(
        b'{"a": 1}\n{"a": \n{"a": NaN}\n{"a": "\xff"}\n' + b'{"a": ' * 100_000 + b"\n" + b"1" * 5000 + b'\n{"a": 2}'
    )
    items = list(stream(file))
    assert [item.value for item in items] == [{"a": 1}, None, None, None, None, None, {"a": 2}]
    errors = [str(item.error) for item in items[1:6]]
    for error, token in zip(errors, ("column", "NaN", "UTF-8", "nested", "4300 digits"), strict=True):
        assert token in error


@pytest.mark.parametrize(
    ("content", "code", "record", "token"),
    [
        (b"", "no-records", None, ""),
        (b"  \n ", "no-records", None, ""),
        (b"hello", "invalid-json", None, "hello"),
        (b'[{"a": 1}, {"a": ', "invalid-json", 2, "line 1, column 18"),
        (b'[{"a": 1}', "invalid-json", None, "record 1"),
        (b'[{"a": 1},\n\n{"a" 1}]', "invalid-json", 2, "line 3, column 6"),
        (b'[{"a": 1} {"a": 2}]', "invalid-json", None, "record 1"),
        (b'[{"a": 1},]', "invalid-json", None, "line 1: remove the comma"),
        (b'[{"a": 1}] x', "invalid-json", None, "line 1: remove the text"),
        (b"[NaN]", "invalid-json", 1, "NaN"),
        (b"[Infinity]", "invalid-json", 1, "Infinity"),
        (b"[" * 200_000, "invalid-json", 1, "nested"),
        (b"[" + b"1" * 5000 + b"]", "invalid-json", 1, "4300 digits"),
        (b'["unterminated', "invalid-json", 1, "Unterminated"),
    ],
)
def test_stream_broken_list_raises_with_position(
    tmp_path: Path, content: bytes, code: str, record: int | None, token: str
) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(content)
    with raises_code(code, file=file, record=record) as caught:
        list(stream(file))
    assert token in str(caught.value)


def test_stream_stops_at_record_size_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "MAX_RECORD_BYTES", 1000)
    file = tmp_path / "a.json"
    file.write_text('["' + "x" * 50_000)
    with raises_code("invalid-json", record=1):
        list(stream(file))
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"a": "' + "x" * 5000 + '"}\n{"a": 1}\n')
    assert [(item.value, item.error is None) for item in stream(lines)] == [(None, False), ({"a": 1}, True)]


def test_write_list_round_trip(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    assert write_list(file, iter(RECORDS)) == len(RECORDS)
    assert json.loads(file.read_text()) == RECORDS
    assert len(file.read_text().splitlines()) == len(RECORDS) + 2


def test_write_list_failure_keeps_existing_file(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_list(file, [1])

    def failing() -> object:
        yield 2
        raise UserError("broken", code="invalid-json")

    with pytest.raises(UserError):
        write_list(file, failing())
    assert json.loads(file.read_text()) == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_item_plain_only_for_ascii_without_nul(tmp_path: Path, suffix: str) -> None:
    values = ["plain", "\\ backslash \n", "\0", "\ud800", "ünï", "\u202e"]
    for ascii_only in (True, False):
        lines = [json.dumps({"a": value}, ensure_ascii=ascii_only) for value in values for _ in range(20)]
        content = "\n".join(lines) if suffix == ".jsonl" else "[" + ",".join(lines) + "]"
        file = tmp_path / f"a{suffix}"
        file.write_bytes(content.encode("utf-8", "surrogatepass"))
        for item in stream(file):
            text = item.value["a"] if item.value else ""
            assert not item.plain or (text.isascii() and "\0" not in text)
        assert any(item.plain for item in stream(file))


def test_stream_missing_file_or_folder_raises(tmp_path: Path) -> None:
    with raises_code("file-not-found", file=tmp_path / "gone.json"):
        list(stream(tmp_path / "gone.json"))
    with raises_code("not-a-file", file=tmp_path):
        list(stream(tmp_path))


@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("indent", [None, 4])
def test_members_of_an_object_equal_json_module(tmp_path: Path, ascii_only: bool, indent: int | None) -> None:
    file = tmp_path / "a.json"
    record = {f"{entry['text']}{number}": entry for number, entry in enumerate(RECORDS)}
    file.write_text(f"\ufeff \n{json.dumps(record, ensure_ascii=ascii_only, indent=indent)}\n ", encoding="utf-8")
    items = list(members(file))
    assert dict(item.value for item in items) == record
    assert [item.number for item in items] == list(range(len(record)))
    with file.open("rb") as handle:
        for item in random.Random(0).sample(items, 20):
            handle.seek(0)
            content = handle.read(item.end)
            assert content[: item.start].count(b"\n") + 1 == item.line
            key, value = item.value
            assert json.loads("{" + content[item.start :].decode() + "}") == {key: value}


@pytest.mark.parametrize("text", ["{}", " { } \n", '{"a": {}}', '{"": 1}'])
def test_members_of_small_objects(tmp_path: Path, text: str) -> None:
    file = tmp_path / "a.json"
    file.write_text(text)
    assert dict(item.value for item in members(file)) == json.loads(text)


@pytest.mark.parametrize(
    "text",
    ["", " ", "[]", "1", "{", '{"a"', '{"a":', '{"a": 1', '{"a": 1,', '{"a": 1,}', "{,}", '{"a" 1}', '{"a": 1 "b": 2}',
     '{1: 2}', '{"a": 1}}', '{"a": 1} 2', '{"a": NaN}', "{'a': 1}", '{"a": [}'],
)  # fmt: skip
def test_members_of_a_broken_object_is_an_error(tmp_path: Path, text: str) -> None:
    file = tmp_path / "a.json"
    file.write_text(text)
    with raises_code("invalid-json", file=file):
        list(members(file))


def test_members_with_the_same_key_are_an_error(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text('{"a": 1,\n"a": 2}')
    with raises_code("duplicate-key", file=file) as caught:
        list(members(file))
    assert "line 2" in str(caught.value)


def test_nan_is_null_on_request_only(tmp_path: Path) -> None:
    for name, text in {
        "a.json": '[{"a": NaN, "b": [-Infinity, 1.5]}]',
        "a.jsonl": '{"a": NaN, "b": [Infinity, 1.5]}',
    }.items():
        file = tmp_path / name
        file.write_text(text)
        assert [item.value for item in stream(file, nan_as_null=True)] == [{"a": None, "b": [None, 1.5]}]
    assert next(iter(stream(tmp_path / "a.jsonl"))).error
    with raises_code("invalid-json"):
        list(stream(tmp_path / "a.json"))
