"""Field access for raw JSON records: every failure names the file, the record, the field and the mend."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from vlm_unlearn.data.json_stream import Item, stream
from vlm_unlearn.errors import Problems, UserError, quoted, report_problem

Parsed = TypeVar("Parsed")


class RawRecord:
    """One JSON object of a data file, with its place for error messages."""

    __slots__ = ("_place", "number", "value")

    def __init__(self, value: object, place: Callable[[], str], number: int = 0) -> None:
        if not isinstance(value, dict):
            raise UserError(f"{place()}: expected an object, found {kind_of(value)}")
        self.value: dict[str, Any] = value
        self._place = place  # put into words only for an error: there are millions of records
        self.number = number

    @property
    def where(self) -> str:
        """``train.json: record 17 (line 203, "Ads_333539")``"""
        return self._place()

    def text(self, *names: str, empty: bool = False) -> str:
        """The first of the named fields that is there; it must be text, and say something unless `empty` is allowed."""
        for name in names:
            if name in self.value:
                found = self.value[name]
                if isinstance(found, str) and (empty or found.strip()):
                    self._check_characters(found, name)
                    return found
                raise UserError(f'{self.where}: "{name}" must be non-empty text, found {kind_of(found)}')
        raise UserError(f'{self.where}: field "{names[0]}" is missing')

    def optional_text(self, name: str) -> str | None:
        """The field's text, or None where it is missing, null or says nothing.

        Raises:
            UserError: something else than text is there.
        """
        found = self.value.get(name)
        if found is None or found == "":
            return None
        return self.text(name, empty=True).strip() or None

    def name(self, *fields: str) -> str:
        """An id: text or a whole number, of the first of the fields that is there."""
        for field in fields:
            found = self.value.get(field)
            if isinstance(found, int) and not isinstance(found, bool):
                return str(found)
            if found is not None:
                return self.text(field)
        raise UserError(f'{self.where}: field "{fields[0]}" is missing')

    def object(self, name: str) -> RawRecord:
        """The object that a field holds."""
        return RawRecord(self.value.get(name), lambda: f"{self.where}: {name}")

    def objects(self, name: str) -> list[RawRecord]:
        """The objects of a list.

        Raises:
            UserError: the field holds no list, or something else than objects is in it.
        """
        found = self.value.get(name)
        if not isinstance(found, list):
            raise UserError(f'{self.where}: "{name}" must be a list, found {kind_of(found)}')
        return [RawRecord(item, partial(self._item_place, name, index)) for index, item in enumerate(found)]

    def _item_place(self, name: str, index: int) -> str:
        return f"{self.where}: {name}[{index}]"

    def _check_characters(self, text: str, name: str) -> None:
        if "\0" in text:
            raise UserError(f'{self.where}: "{name}" holds a NUL character')
        if not text.isascii():
            try:
                text.encode("utf-8")
            except UnicodeEncodeError:
                raise UserError(
                    f'{self.where}: "{name}" holds a broken character: half of one, or bytes that are not UTF-8; save the file as UTF-8'
                ) from None


def read_objects(path: Path, name_field: str, problems: Problems | None = None) -> Iterator[RawRecord]:
    """The objects of a JSON list or a JSON-lines file, one at a time; each knows its number, line and, where it has one, name.

    Args:
        problems: takes what is not an object; without it the first one raises.
    """
    for item in stream(path):
        place = partial(item_place, path, item, name_field)
        if item.error:
            report_problem(UserError(f"{place()}: {item.error}"), problems)
            continue
        try:
            record = RawRecord(item.value, place, item.number)
        except UserError as error:
            report_problem(error, problems)
            continue
        yield record


def parsed(
    records: Iterable[RawRecord], parse: Callable[[RawRecord], Parsed], problems: Problems | None
) -> Iterator[Parsed]:
    """What `parse` makes of each record; one that it refuses is listed, or raised where nobody lists, and the next follows."""
    for record in records:
        try:
            found = parse(record)
        except UserError as error:
            report_problem(error, problems)
            continue
        yield found


def item_place(path: Path, item: Item, name_field: str) -> str:
    """``train.json: record 17 (line 203, "Ads_333539")``"""
    name = item.value.get(name_field) if isinstance(item.value, dict) else None
    named = f", {quoted(name)}" if isinstance(name, str | int) else ""
    return f"{path.name}: record {item.number} (line {item.line}{named})"


def kind_of(value: object) -> str:
    """What a JSON value is, in words: ``"a number"``."""
    if value is None:
        return "nothing"
    return {dict: "an object", list: "a list", str: "text" if value else "empty text", bool: "true or false"}.get(
        type(value), "a number"
    )
