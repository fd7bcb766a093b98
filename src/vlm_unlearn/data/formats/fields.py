"""Field access for raw JSON records: every failure names the file, the record, the field and the mend."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlm_unlearn.errors import RequestError
from vlm_unlearn.store import read_json


class RawRecord:
    """One JSON object of a data file, with its place for error messages."""

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, dict):
            raise RequestError(f"{where}: expected an object, found {_kind(value)}")
        self.value: dict[str, Any] = value
        self.where = where

    def text(self, *names: str, empty: bool = False) -> str:
        """The first of the named fields that is there; it must be text, and say something unless `empty` is allowed."""
        for name in names:
            if name in self.value:
                found = self.value[name]
                if isinstance(found, str) and (empty or found.strip()):
                    return found
                raise RequestError(f'{self.where}: "{name}" must be non-empty text, found {_kind(found)}')
        raise RequestError(f'{self.where}: field "{names[0]}" is missing')

    def optional_text(self, name: str) -> str | None:
        found = self.value.get(name)
        return found if isinstance(found, str) and found.strip() else None

    def objects(self, name: str) -> list[RawRecord]:
        found = self.value.get(name)
        if not isinstance(found, list):
            raise RequestError(f'{self.where}: "{name}" must be a list, found {_kind(found)}')
        return [RawRecord(item, f"{self.where}: {name}[{index}]") for index, item in enumerate(found)]


def read_objects(path: Path, name_field: str) -> Iterator[RawRecord]:
    """The objects of a JSON list or a JSON-lines file; each knows its record number and, where it has one, its name."""
    for number, value in enumerate(_read_list(path)):
        name = value.get(name_field) if isinstance(value, dict) else None
        named = f" ({json.dumps(name)})" if isinstance(name, str | int) else ""
        yield RawRecord(value, f"{path.name}: record {number}{named}")


def _read_list(path: Path) -> list[Any]:
    if _is_json_lines(path):
        return _read_lines(path)
    value = read_json(path)
    if not isinstance(value, list):
        raise RequestError(f"{path}: expected a JSON list of records, found {_kind(value)}")
    return value


def _is_json_lines(path: Path) -> bool:
    """By its name or, as SafeEraser's files are seen in the wild, by a first line that is an object of its own."""
    if path.suffix == ".jsonl":
        return True
    try:
        with path.open("rb") as handle:
            first = handle.readline(10_000_000).strip()
            return first.startswith(b"{") and first.endswith(b"}") and bool(handle.readline().strip())
    except OSError:
        return False  # the reader says what is wrong


def _read_lines(path: Path) -> list[Any]:
    try:
        with path.open(encoding="utf-8-sig") as handle:
            return [_parse(line, f"{path}: line {number}") for number, line in enumerate(handle, start=1) if line.strip()]
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise RequestError(f"{path}: not UTF-8 text") from None


def _parse(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{where}: {error}") from None


def _kind(value: object) -> str:
    if value is None:
        return "nothing"
    return {dict: "an object", list: "a list", str: "text" if value else "empty text", bool: "true or false"}.get(type(value), "a number")
