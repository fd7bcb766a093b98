"""Reads and writes JSON lists and JSON lines of any size. Only one record is in memory at a time."""

from __future__ import annotations

import codecs
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

from vlm_unlearn.errors import UserError, quoted
from vlm_unlearn.store import (
    DuplicateKeyError,
    detect_encoding,
    is_other_encoding,
    not_utf8,
    open_atomically,
    unique_keys,
)

CHUNK_BYTES = 4 << 20
MAX_RECORD_BYTES = 64 << 20
UNDECODED = re.compile("[\udc80-\udcff]")  # bytes that are not UTF-8, decoded with surrogateescape
_WHITE_SPACE = re.compile(r"[ \t\n\r]*")


class Item(NamedTuple):
    """One record of a JSON file.

    Attributes:
        number: The number of the record, counted from 0.
        line: The line on which the record starts, counted from 1.
        start: The position of its first byte in the file.
        end: The position after its last byte.
        value: The JSON value. None if `error` is set.
        error: What is wrong with a line that is not JSON, or with an object that has a key twice.
        plain: Whether all texts of the record are certain to be ASCII without NUL characters.
    """

    number: int
    line: int
    start: int
    end: int
    value: Any
    error: str | None = None
    plain: bool = False


def _reject_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"{digits[:20]} is too large a number")
    return number


class _Decoders(NamedTuple):
    """A decoder that rejects an object with a key twice, and the same decoder without this check."""

    unique: json.JSONDecoder
    lenient: json.JSONDecoder

    @classmethod
    def create(cls, parse_constant: Callable[[str], Any], parse_float: Callable[[str], Any]) -> _Decoders:
        """Returns decoders.

        Args:
            parse_constant: Returns the value of ``NaN``, ``Infinity`` or ``-Infinity``.
            parse_float: Returns the value of the digits of a number with a fraction or an exponent.
        """
        return cls(
            json.JSONDecoder(parse_constant=parse_constant, parse_float=parse_float, object_pairs_hook=unique_keys),
            json.JSONDecoder(parse_constant=parse_constant, parse_float=parse_float),
        )


_DECODERS = _Decoders.create(_reject_constant, _finite)
_NAN_DECODERS = _Decoders.create(lambda name: None, _finite)

_PROGRESS_CALLBACK: ContextVar[Callable[[Path, int, int], None] | None] = ContextVar("progress_callback", default=None)


@contextmanager
def reading_progress(on_read: Callable[[Path, int, int], None]) -> Iterator[None]:
    """Reports the progress of every file that is read within the block.

    Args:
        on_read: Called with the file, the number of bytes that have been read, and the size of the file in bytes.
    """
    token = _PROGRESS_CALLBACK.set(on_read)
    try:
        yield
    finally:
        _PROGRESS_CALLBACK.reset(token)


def stream(path: Path, nan_as_null: bool = False) -> Iterator[Item]:
    """Reads the records of a JSON list or a JSON-lines file, one at a time.

    The content decides which of the two the file is, not its name. A line that is not JSON becomes an `Item` with
    `error`, and reading continues at the next line. A syntax error in a list raises, because the next record cannot be
    located. NaN and Infinity are syntax errors, because other JSON readers reject them.

    Args:
        path: The file.
        nan_as_null: Read NaN and Infinity, which pandas writes for empty cells, as null.

    Raises:
        UserError: The file cannot be read, is neither a list nor lines, or contains a broken list.
    """
    decoders = _NAN_DECODERS if nan_as_null else _DECODERS

    def items(handle: BinaryIO, start: int, size: int) -> Iterator[Item]:
        read = _lines if _is_lines(path, handle, start, size) else _list
        return read(path, handle, start, decoders)

    return _read(path, items)


def members(path: Path) -> Iterator[Item]:
    """Reads the members of a file that is one JSON object, one at a time. Only their keys stay in memory.

    Yields:
        An `Item` per member. Its value is the pair of the key and the value.

    Raises:
        UserError: The file cannot be read, is not an object, is broken, or contains a key twice.
    """
    return _read(path, lambda handle, start, size: _object(path, handle, start))


def _read(path: Path, read: Callable[[BinaryIO, int, int], Iterator[Item]]) -> Iterator[Item]:
    """Opens a file, and yields the items that `read` returns for the open file, its first byte and its size."""
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise UserError("is a device or a pipe. Pass a file.", code="not-a-file", file=path)
        with path.open("rb") as handle:
            size = os.fstat(handle.fileno()).st_size
            start = 3 if handle.read(3) == codecs.BOM_UTF8 else 0
            handle.seek(start)
            items = read(handle, start, size)
            on_read = _PROGRESS_CALLBACK.get()
            if on_read is None:
                yield from items
                return
            for item in items:
                if item.number % 1000 == 0:
                    on_read(path, item.end, size)
                yield item
            on_read(path, size, size)
    except FileNotFoundError:
        raise UserError("no such file", code="file-not-found", file=path) from None
    except OSError as error:
        code = "not-a-file" if isinstance(error, IsADirectoryError) else "file-unreadable"
        raise UserError(str(error.strerror), code=code, file=path) from None


def _is_lines(path: Path, handle: BinaryIO, start: int, size: int) -> bool:
    """Returns whether a file is JSON lines, which start with ``{``, and not a list, which starts with ``[``.

    An empty file is JSON lines if its name ends in ``.jsonl``.
    """
    head = b""
    while not head and handle.tell() < size:
        head = handle.read(CHUNK_BYTES).lstrip()
    handle.seek(start)
    if not detect_encoding(head[:16]).startswith("utf-8"):
        raise not_utf8(path)
    if not head:
        if path.suffix == ".jsonl":
            return True
        raise UserError("is empty. Expected a JSON list or JSON lines.", code="no-records", file=path)
    if head[:1] == b"[":
        return False
    if head[:1] == b"{" or path.suffix == ".jsonl":
        return True
    content = quoted(head[:20].decode("ascii", "backslashreplace"))
    raise UserError(f"expected a JSON list or JSON lines, found {content}", code="invalid-json", file=path)


def _lines(path: Path, handle: BinaryIO, start: int, decoders: _Decoders) -> Iterator[Item]:
    number = 0
    line_number = 0
    while True:
        line = handle.readline(MAX_RECORD_BYTES)
        if not line:
            return
        line_number += 1
        end = start + len(line)
        error = None
        value = None
        if len(line) == MAX_RECORD_BYTES and not line.endswith(b"\n"):
            error = f"the line is longer than {MAX_RECORD_BYTES >> 20} MB"
            while line and not line.endswith(b"\n"):
                line = handle.readline(MAX_RECORD_BYTES)
                end += len(line)
        elif line.strip():
            value, error = _parse_line(path, line, decoders)
        else:
            start = end
            continue
        yield Item(number, line_number, start, end, value, error, line.isascii() and b"\\u" not in line)
        number += 1
        start = end


def _parse_line(path: Path, line: bytes, decoders: _Decoders) -> tuple[Any, str | None]:
    try:
        return decoders.unique.decode(line.decode("utf-8")), None
    except UnicodeDecodeError as error:
        if is_other_encoding(path):
            raise not_utf8(path) from None
        return None, f"byte {error.start + 1} is not UTF-8 text"
    except RecursionError:
        return None, "nested too deeply"
    except json.JSONDecodeError as error:
        return None, f"not valid JSON: {error.msg} (column {error.colno})"
    except DuplicateKeyError as error:
        return None, str(error)
    except ValueError as error:
        return None, f"not valid JSON: {error}"


class _Window:
    """A window of decoded text that moves through a file.

    Bytes that are not UTF-8 become lone surrogates, which the readers of the fields detect. A file in another encoding
    is an error.

    Attributes:
        text: The decoded text of the window.
        position: The current position in `text`.
        byte: The position in the file that corresponds to `position`.
        line: The line of `position`, counted from 1.
        plain: Whether the window is ASCII without escapes.
        ended: Whether the end of the file has been reached.
    """

    def __init__(self, handle: BinaryIO, start: int) -> None:
        self._handle = handle
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="surrogateescape")
        self._ascii = True
        self.plain = True
        self.text = ""
        self.position = 0
        self.byte = start
        self.line = 1
        self.ended = False
        self._column_offset = 0  # characters between the last line break and the start of the window

    def column(self, position: int) -> int:
        """Returns the column of a position of the window, counted from 1."""
        newline = self.text.rfind("\n", 0, position)
        return position - newline if newline >= 0 else self._column_offset + position + 1

    def extend(self) -> None:
        """Drops the text before the position and reads more.

        The unread text at least doubles, so that the time for a long record grows linearly with its length.
        """
        unread = self.text[self.position :]
        self._column_offset = self.column(self.position) - 1
        raw = self._handle.read(max(CHUNK_BYTES, len(unread)))
        self.ended = not raw
        decoded = self._decoder.decode(raw, final=self.ended)
        if not decoded.isascii() and UNDECODED.search(decoded) and is_other_encoding(Path(self._handle.name)):
            raise not_utf8(Path(self._handle.name))
        self.text = unread + decoded
        self._ascii = self.text.isascii()
        self.plain = self._ascii and "\\u" not in self.text  # computed once per window, not once per text
        self.position = 0

    def advance(self, position: int) -> None:
        """Moves to a later position of the window, and counts its bytes and lines."""
        if self._ascii:
            self.byte += position - self.position
        else:
            self.byte += len(self.text[self.position : position].encode("utf-8", "surrogateescape"))
        self.line += self.text.count("\n", self.position, position)
        self.position = position

    def next_char(self) -> str:
        """Skips white space and returns the next character, or ``""`` at the end of the file."""
        while True:
            end = _WHITE_SPACE.match(self.text, self.position).end()  # type: ignore[union-attr]  # matches empty text
            if end > self.position:
                self.advance(end)
            if end < len(self.text):
                return self.text[end]
            if self.ended:
                return ""
            self.extend()


def _list(path: Path, handle: BinaryIO, start: int, decoders: _Decoders) -> Iterator[Item]:
    window = _Window(handle, start)
    window.next_char()
    window.advance(window.position + 1)  # the opening bracket
    number = 0
    char = window.next_char()
    while char != "]":
        yield _record(path, window, number, decoders)
        number += 1
        char = window.next_char()
        if char == ",":
            window.advance(window.position + 1)
            if window.next_char() == "]":
                raise UserError(
                    f"line {window.line}: remove the comma before the closing bracket", code="invalid-json", file=path
                )
        elif char != "]":
            problem = f"found {quoted(char)}" if char else "but the file ends. It is truncated."
            raise UserError(
                f"line {window.line}: expected a comma or ] after record {number}, {problem}",
                code="invalid-json",
                file=path,
            )
    window.advance(window.position + 1)
    if window.next_char():
        raise UserError(f"line {window.line}: remove the text after the list", code="invalid-json", file=path)


def _object(path: Path, handle: BinaryIO, start: int) -> Iterator[Item]:
    window = _Window(handle, start)
    char = window.next_char()
    if char != "{":
        content = f"found {quoted(char)}" if char else "but the file is empty"
        raise UserError(f"expected a JSON object, {content}", code="invalid-json", file=path)
    keys: set[str] = set()

    def error(problem: str) -> UserError:
        return UserError(f"line {window.line}: {problem}", code="invalid-json", file=path, record=len(keys) + 1)

    while True:
        window.advance(window.position + 1)  # the opening brace or a comma
        if window.next_char() == "}" and not keys:
            break
        key = _record(path, window, len(keys), _DECODERS)
        if not isinstance(key.value, str):
            raise error("expected a key in quotes")
        if key.value in keys:
            raise UserError(
                f"line {window.line}: contains the key {quoted(key.value)} twice. Keep one of the two.",
                code="duplicate-key",
                file=path,
            )
        if window.next_char() != ":":
            raise error("expected a colon after the key")
        window.advance(window.position + 1)
        if not window.next_char():
            raise error("the file ends. It is truncated.")
        item = _record(path, window, len(keys), _DECODERS)
        yield item._replace(start=key.start, line=key.line, value=(key.value, item.value))
        keys.add(key.value)
        char = window.next_char()
        if char not in (",", "}"):
            problem = f"found {quoted(char)}" if char else "but the file ends. It is truncated."
            raise error(f"expected a comma or }}, {problem}")
        if char == "}":
            break
    window.advance(window.position + 1)
    if window.next_char():
        raise UserError(f"line {window.line}: remove the text after the object", code="invalid-json", file=path)


def _record(path: Path, window: _Window, number: int, decoders: _Decoders) -> Item:
    while True:
        try:
            value, end, duplicate_key = _decode(window, decoders)
        except RecursionError:
            problem = f"line {window.line}: nested too deeply"
            raise UserError(problem, code="invalid-json", file=path, record=number + 1) from None
        except ValueError as error:
            # The window may end within the record.
            if window.ended or len(window.text) - window.position > MAX_RECORD_BYTES:
                problem = _describe_syntax_error(error, window)
                raise UserError(problem, code="invalid-json", file=path, record=number + 1) from None
            window.extend()
            continue
        if end < len(window.text) or window.ended:  # otherwise a number may continue after the window
            break
        window.extend()
    start, line = window.byte, window.line
    window.advance(end)
    return Item(number, line, start, window.byte, value, duplicate_key, window.plain)


def _decode(window: _Window, decoders: _Decoders) -> tuple[Any, int, str | None]:
    """Returns the value of the next record, its end, and what is wrong with it: an object has a key twice.

    Raises:
        ValueError: The text is not JSON, or the window ends within the record.
    """
    try:
        value, end = decoders.unique.raw_decode(window.text, window.position)
    except DuplicateKeyError as error:
        return None, decoders.lenient.raw_decode(window.text, window.position)[1], str(error)
    return value, end, None


def _describe_syntax_error(error: ValueError, window: _Window) -> str:
    if isinstance(error, json.JSONDecodeError):
        line = window.line + window.text.count("\n", window.position, error.pos)
        return f"line {line}, column {window.column(error.pos)}: not valid JSON: {error.msg}"
    return f"line {window.line}: not valid JSON: {error}"


def text_at(handle: BinaryIO, start: int, end: int) -> str:
    """Returns the JSON text of a record on one line.

    Args:
        handle: The open file.
        start: `Item.start` of the record.
        end: `Item.end` of the record.
    """
    handle.seek(start)
    raw = handle.read(end - start)
    if b"\n" not in raw:
        try:
            return raw.decode("utf-8").strip()
        except UnicodeDecodeError:
            pass
    return dump(_DECODERS.unique.decode(raw.decode("utf-8", "surrogateescape")))


def dump(value: object) -> str:
    """Returns a value as JSON on one line.

    A lone surrogate, which a UTF-8 file cannot contain, is written as an escape sequence.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return json.dumps(value, allow_nan=False)
    return text


def write_list(path: Path, records: Iterable[Any], text: Callable[[Any], str] = dump) -> int:
    """Writes a JSON list with one record per line. Only one record is in memory, and the write is atomic.

    Args:
        path: The output file.
        records: The records.
        text: Returns a record as JSON on one line.

    Returns:
        The number of records.

    Raises:
        UserError: There are no records. An existing file stays as it is.
    """
    count = 0
    with open_atomically(path) as handle:
        handle.write("[")
        for record in records:
            handle.write(f"{',' if count else ''}\n{text(record)}")
            count += 1
        handle.write("\n]\n")
        if not count:
            raise UserError("there are no records to write", code="no-records", file=path)
    return count


def write_lines(path: Path, records: Iterable[Any], text: Callable[[Any], str] = dump) -> int:
    """Writes JSON lines. Only one record is in memory, and the write is atomic.

    Args:
        path: The output file.
        records: The records.
        text: Returns a record as JSON on one line.

    Returns:
        The number of records.

    Raises:
        UserError: There are no records. An existing file stays as it is.
    """
    count = 0
    with open_atomically(path) as handle:
        for record in records:
            handle.write(text(record) + "\n")
            count += 1
        if not count:
            raise UserError("there are no records to write", code="no-records", file=path)
    return count
