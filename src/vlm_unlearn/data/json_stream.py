"""JSON lists and JSON lines of any size, a record at a time: memory for one record, a place for every error."""

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

from vlm_unlearn.errors import UserError
from vlm_unlearn.store import open_atomically

CHUNK = 4 << 20
MAX_RECORD_BYTES = 64 << 20
_SPACE = re.compile(r"[ \t\n\r]*")


class Item(NamedTuple):
    """One record of a file. `error` says what is wrong with a line that is not JSON; `value` is None then."""

    number: int  # from 0
    line: int  # the line it begins on, from 1
    start: int  # its bytes in the file
    end: int
    value: Any
    error: str | None = None
    plain: bool = False  # surely ASCII without NUL in all its texts


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"{digits[:20]} is too large a number")
    return number


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite)


_WATCHER: ContextVar[Callable[[Path, int, int], None] | None] = ContextVar("watcher", default=None)


@contextmanager
def watching(on_read: Callable[[Path, int, int], None]) -> Iterator[None]:
    """Within the block, `on_read` is told how far each file is read: file, bytes read, bytes in all."""
    before = _WATCHER.set(on_read)
    try:
        yield
    finally:
        _WATCHER.reset(before)


def stream(path: Path) -> Iterator[Item]:
    """The records of a JSON list or a JSON-lines file (told by the content, whatever the name), one in memory at a time.

    A line that is not JSON is an Item with `error`, and the next line follows. In a list nothing can be found again behind a
    syntax error, so that one raises. NaN and Infinity are syntax errors: no other JSON reader would take the file.

    Raises:
        UserError: the file can't be read, is neither form, or a list is broken; file and line are named.
    """
    try:
        with path.open("rb") as handle:
            size = os.fstat(handle.fileno()).st_size
            mark = 3 if handle.read(3) == codecs.BOM_UTF8 else 0
            handle.seek(mark)
            items = _lines(handle, mark) if _is_lines(path, handle, mark, size) else _list(path, handle, mark)
            watcher = _WATCHER.get()
            if watcher is None:
                yield from items
                return
            for item in items:
                if item.number % 1000 == 0:
                    watcher(path, item.end, size)
                yield item
            watcher(path, size, size)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def _is_lines(path: Path, handle: BinaryIO, start: int, size: int) -> bool:
    """A file that begins with ``[`` is a list, one that begins with ``{`` has a record a line; an empty one goes by its name."""
    first = b""
    while not first and handle.tell() < size:
        first = handle.read(CHUNK).lstrip()
    handle.seek(start)
    if first.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{path}: is UTF-16; save it as UTF-8")
    if not first:
        if path.suffix == ".jsonl":
            return True
        raise UserError(f"{path}: is empty; expected a JSON list or JSON lines")
    if first[:1] == b"[":
        return False
    if first[:1] == b"{" or path.suffix == ".jsonl":
        return True
    raise UserError(
        f"{path}: expected a JSON list or JSON lines, found {first[:20].decode('ascii', 'backslashreplace')!r}"
    )


def _lines(handle: BinaryIO, start: int) -> Iterator[Item]:
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
            error = f"is longer than {MAX_RECORD_BYTES >> 20} MB"
            while line and not line.endswith(b"\n"):
                line = handle.readline(MAX_RECORD_BYTES)
                end += len(line)
        elif line.strip():
            value, error = _parse_line(line)
        else:
            start = end
            continue
        yield Item(number, line_number, start, end, value, error, line.isascii() and b"\\u" not in line)
        number += 1
        start = end


def _parse_line(line: bytes) -> tuple[Any, str | None]:
    try:
        return _DECODER.decode(line.decode("utf-8")), None
    except UnicodeDecodeError as error:
        return None, f"byte {error.start + 1} is not UTF-8 text"
    except RecursionError:
        return None, "nested too deeply to be data"
    except json.JSONDecodeError as error:
        return None, f"not JSON: {error.msg} (column {error.colno})"
    except ValueError as error:
        return None, f"not JSON: {error}"


class _Window:
    """Decoded text that moves through the file. Bytes that are not UTF-8 become lone surrogates, found later."""

    def __init__(self, handle: BinaryIO, start: int) -> None:
        self._handle = handle
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="surrogateescape")
        self._ascii = True
        self.plain = True
        self.text = ""
        self.place = 0  # in `text`
        self.byte = start  # of `place` in the file
        self.line = 1
        self.ended = False
        self._before = 0  # characters between the last line break and the window

    def column(self, place: int) -> int:
        """The column of a place of the window, from 1."""
        newline = self.text.rfind("\n", 0, place)
        return place - newline if newline >= 0 else self._before + place + 1

    def more(self) -> None:
        """Drops what was read and doubles what is left, so that a long record costs its length only a few times."""
        left = self.text[self.place :]
        self._before = self.column(self.place) - 1
        raw = self._handle.read(max(CHUNK, len(left)))
        self.ended = not raw
        self.text = left + self._decoder.decode(raw, final=self.ended)
        self._ascii = self.text.isascii()
        self.plain = self._ascii and "\\u" not in self.text  # once a window, not once a text
        self.place = 0

    def advance(self, place: int) -> None:
        """Moves to a later place of the window, counting bytes and lines."""
        if self._ascii:
            self.byte += place - self.place
        else:
            self.byte += len(self.text[self.place : place].encode("utf-8", "surrogateescape"))
        self.line += self.text.count("\n", self.place, place)
        self.place = place

    def next_char(self) -> str:
        """Skips white space; the character there, or ``""`` at the end of the file."""
        while True:
            end = _SPACE.match(self.text, self.place).end()  # type: ignore[union-attr]  # matches the empty text
            if end > self.place:
                self.advance(end)
            if end < len(self.text):
                return self.text[end]
            if self.ended:
                return ""
            self.more()


def _list(path: Path, handle: BinaryIO, start: int) -> Iterator[Item]:
    window = _Window(handle, start)
    window.next_char()
    window.advance(window.place + 1)  # the opening bracket
    number = 0
    char = window.next_char()
    while char != "]":
        yield _record(path, window, number)
        number += 1
        char = window.next_char()
        if char == ",":
            window.advance(window.place + 1)
            if window.next_char() == "]":
                raise UserError(f"{path}: line {window.line}: a comma stands before the closing bracket")
        elif char != "]":
            found = f"found {char!r}" if char else "the file ends; it was cut short"
            raise UserError(f"{path}: line {window.line}: expected a comma or ] after record {number - 1}, {found}")
    window.advance(window.place + 1)
    if window.next_char():
        raise UserError(f"{path}: line {window.line}: text after the end of the list")


def _record(path: Path, window: _Window, number: int) -> Item:
    while True:
        try:
            value, end = _DECODER.raw_decode(window.text, window.place)
        except RecursionError:
            raise UserError(f"{path}: line {window.line}: record {number} is nested too deeply to be data") from None
        except ValueError as error:
            # Perhaps the window ends within the record.
            if window.ended or len(window.text) - window.place > MAX_RECORD_BYTES:
                raise UserError(f"{path}: {_where(error, window, number)}") from None
            window.more()
            continue
        if end < len(window.text) or window.ended:  # else a number may go on behind the window
            break
        window.more()
    start, line = window.byte, window.line
    window.advance(end)
    return Item(number, line, start, window.byte, value, None, window.plain)


def _where(error: ValueError, window: _Window, number: int) -> str:
    if isinstance(error, json.JSONDecodeError):
        line = window.line + window.text.count("\n", window.place, error.pos)
        return f"line {line}, column {window.column(error.pos)}: record {number} is not JSON: {error.msg}"
    return f"line {window.line}: record {number} is not JSON: {error}"


def text_at(handle: BinaryIO, start: int, end: int) -> str:
    """The JSON text at an Item's bytes, on one line."""
    handle.seek(start)
    raw = handle.read(end - start)
    if b"\n" not in raw:
        try:
            return raw.decode("utf-8").strip()
        except UnicodeDecodeError:
            pass
    return dump(_DECODER.decode(raw.decode("utf-8", "surrogateescape")))


def dump(value: object) -> str:
    """A value as JSON on one line; a lone surrogate, which no UTF-8 file can hold, as the escape it came as."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return json.dumps(value, allow_nan=False)
    return text


def write_list(path: Path, records: Iterable[Any], text: Callable[[Any], str] = dump) -> int:
    """Writes a JSON list, a record a line, never holding more than one; atomic. Returns how many records it holds.

    Args:
        text: a record as JSON on one line.

    Raises:
        UserError: there are no records; what was there stays.
    """
    count = 0
    with open_atomically(path) as handle:
        handle.write("[")
        for record in records:
            handle.write(f"{',' if count else ''}\n{text(record)}")
            count += 1
        handle.write("\n]\n")
        if not count:
            raise UserError(f"{path}: there is no record to write")
    return count


def write_lines(path: Path, records: Iterable[Any]) -> int:
    """Writes JSON lines, otherwise as `write_list`."""
    count = 0
    with open_atomically(path) as handle:
        for record in records:
            handle.write(dump(record) + "\n")
            count += 1
        if not count:
            raise UserError(f"{path}: there is no record to write")
    return count
