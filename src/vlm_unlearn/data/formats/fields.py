"""Typed access to the fields of raw JSON records. Every error names the file, the record and the field."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from numbers import Integral, Number
from pathlib import Path
from typing import Any, TypeVar

from vlm_unlearn.data.json_stream import Item, stream
from vlm_unlearn.errors import Problems, UserError, quoted, report_problem

Parsed = TypeVar("Parsed")


class RawRecord:
    """One JSON object of a data file, with its position for error messages.

    Args:
        value: The JSON value.
        file: The name of the data file.
        position: Returns the position of the record in the file, such as ``17 (line 203, "Ads_333539")``. It is called
            only for an error, because a file can contain millions of records.
        number: The number of the record, counted from 0.
        field: The path of the object inside its record, such as ``instr-resp[0]``. Empty for the record itself.

    Raises:
        UserError: `value` is not an object.
    """

    __slots__ = ("_position", "field", "file", "number", "value")

    def __init__(
        self,
        value: object,
        file: str | Path | None = None,
        position: Callable[[], str] | None = None,
        number: int = 0,
        field: str = "",
    ) -> None:
        self.file = file
        self._position = position
        self.number = number
        self.field = field
        if not isinstance(value, dict):
            raise self.error(f"expected an object, found {json_type(value)}", "invalid-field")
        self.value: dict[str, Any] = value

    @property
    def position(self) -> str | None:
        """The position of the record in its file, such as ``17 (line 203, "Ads_333539")``. Numbers count from 1."""
        return self._position() if self._position else None

    @property
    def where(self) -> str:
        """The file, the record and the field, for messages that are built by hand."""
        place = ", record ".join(str(name) for name in (self.file, self.position) if name is not None)
        return ": ".join(name for name in (place, self.field) if name)

    def error(self, message: str, code: str, field: str = "") -> UserError:
        """Returns an error about this record.

        Args:
            message: One sentence that says what is wrong and how to fix it.
            code: The code of the error.
            field: The field that the error is about. Empty for the object itself.
        """
        path = ".".join(name for name in (self.field, field) if name)
        return UserError(message, code=code, file=self.file, record=self.position, field=path or None)

    def text(self, *names: str, empty: bool = False) -> str:
        """Returns the text of the first of the named fields that the record contains.

        Args:
            names: The names of the field. Some formats have several spellings of one name.
            empty: Accepts text that is empty or white space.

        Raises:
            UserError: The field is missing, is not text, is empty, or contains characters that are not valid.
        """
        for name in names:
            if name in self.value:
                text = self.value[name]
                if isinstance(text, str) and (empty or text.strip()):
                    self._check_characters(text, name)
                    return text
                code = "empty-field" if isinstance(text, str) else "invalid-field"
                expected = "text" if empty else "non-empty text"
                raise self.error(f"must be {expected}, found {json_type(text)}", code, name)
        raise self.error("the field is missing", "missing-field", names[0])

    def optional_text(self, name: str) -> str | None:
        """Returns the text of a field, or None if the field is missing, null or empty.

        Raises:
            UserError: The field contains anything else than text.
        """
        value = self.value.get(name)
        if value is None or value == "":
            return None
        return self.text(name, empty=True).strip() or None

    def name(self, *fields: str) -> str:
        """Returns an id: the text or the integer in the first of the fields that is set.

        Raises:
            UserError: No field is set, or the first one contains anything else.
        """
        for field in fields:
            value = self.value.get(field)
            if isinstance(value, Integral) and not isinstance(value, bool):  # numpy's integers too
                return str(int(value))
            if value is not None:
                return self.text(field)
        raise self.error("the field is missing", "missing-field", fields[0])

    def object(self, name: str) -> RawRecord:
        """Returns the object in a field."""
        return self._nested(self.value.get(name), name)

    def objects(self, name: str) -> list[RawRecord]:
        """Returns the objects of a list.

        Raises:
            UserError: The field is not a list, or an item of the list is not an object.
        """
        items = self.value.get(name)
        if not isinstance(items, list | tuple):  # a row in memory can contain a tuple
            raise self.error(f"must be a list, found {json_type(items)}", "invalid-field", name)
        return [self._nested(item, f"{name}[{index}]") for index, item in enumerate(items)]

    def _nested(self, value: Any, name: str) -> RawRecord:
        return RawRecord(value, self.file, self._position, self.number, f"{self.field}.{name}" if self.field else name)

    def _check_characters(self, text: str, name: str) -> None:
        if "\0" in text:
            raise self.error("contains a NUL character. Remove it.", "invalid-encoding", name)
        if not text.isascii():
            try:
                text.encode("utf-8")
            except UnicodeEncodeError:
                raise self.error(
                    "contains half of a surrogate pair, or bytes that are not UTF-8. Save the file as UTF-8.",
                    "invalid-encoding",
                    name,
                ) from None


def read_objects(
    path: Path, name_field: str, problems: Problems | None = None, nan_as_null: bool = False
) -> Iterator[RawRecord]:
    """Reads the objects of a JSON list or a JSON-lines file, one at a time.

    Args:
        path: The file.
        name_field: The field with the id of a record, for error messages.
        problems: Collects the records that are not objects. Without it the first one raises.
        nan_as_null: As in `stream`.
    """
    for item in stream(path, nan_as_null):
        position = partial(item_position, item, name_field)
        try:
            if item.error:
                raise UserError(item.error, code="invalid-json", file=path.name, record=position())
            record = RawRecord(item.value, path.name, position, item.number)
        except UserError as error:
            report_problem(error, problems)
            continue
        yield record


def parse_records(
    records: Iterable[RawRecord], parse: Callable[[RawRecord], Parsed], problems: Problems | None
) -> Iterator[Parsed]:
    """Yields the result of `parse` for each record.

    A record for which `parse` raises a `UserError` is added to `problems` and skipped. If `problems` is None, the error
    is raised.
    """
    for record in records:
        try:
            result = parse(record)
        except UserError as error:
            report_problem(error, problems)
            continue
        yield result


def item_position(item: Item, name_field: str) -> str:
    """Returns the position of a record for error messages, such as ``17 (line 203, "Ads_333539")``.

    The number counts from 1. The id follows if the record has one.
    """
    name = item.value.get(name_field) if isinstance(item.value, dict) else None
    suffix = f", {quoted(name)}" if isinstance(name, str | int) else ""
    return f"{item.number + 1} (line {item.line}{suffix})"


def json_type(value: object) -> str:
    """Returns the type of a value in words, such as ``"a number"``."""
    if value is None:
        return "nothing"
    if isinstance(value, str):
        return "text" if value else "empty text"
    names = {dict: "an object", list: "a list", bool: "true or false"}
    return names.get(type(value), "a number" if isinstance(value, Number) else f"a {type(value).__name__}")
