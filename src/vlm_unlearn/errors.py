"""The two errors of the package: an invalid request (exit code 2) and failed work (exit code 1)."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from os import PathLike
from typing import Any, Self


class _CodedError(Exception):
    """Base of both errors: a message, a stable code, and the location that the message is about.

    ``str(error)`` is one line: ``FILE, record RECORD: FIELD: MESSAGE``, without the attributes that are not set. Long
    attributes are shortened in it.

    Args:
        message: One sentence that says what is wrong and how to fix it.
        code: A stable name in kebab case, such as ``image-not-found``. Programs and tests compare codes, not messages.
        file: The file or folder that the error is about.
        record: The record of that file: its number, counted from 1, or its id.
        field: The config key, column or argument that the error is about.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str,
        file: str | PathLike[str] | None = None,
        record: int | str | None = None,
        field: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.file = file
        self.record = record
        self.field = field

    def __str__(self) -> str:
        record = None if self.record is None else f"record {self.record}"
        location = ", ".join(shortened(str(item)) for item in (self.file, record) if item is not None)
        return ": ".join(item for item in (location, shortened(self.field or ""), self.message) if item)

    def with_fix(self, fix: str) -> Self:
        """Returns the error with a further sentence at the end of its message, which says how to fix it."""
        message = f"{self.message.rstrip('.')}. {fix}"
        return type(self)(message, code=self.code, file=self.file, record=self.record, field=self.field)

    def __reduce__(self) -> tuple[Any, ...]:
        # The default would call the class with the message alone. Data workers send their errors pickled.
        return _rebuild, (type(self), self.message, self.code, self.file, self.record, self.field)


def _rebuild(kind: type[_CodedError], message: str, code: str, file: Any, record: Any, field: Any) -> _CodedError:
    return kind(message, code=code, file=file, record=record, field=field)


class DeprecatedNameWarning(FutureWarning):
    """A config key, config value, command or option has its old name, which the next version removes."""


class UserError(_CodedError, ValueError):
    """The request is invalid, such as an unknown name or a missing file. The command exits with code 2."""


class RunError(_CodedError, RuntimeError):
    """The request is valid but the work failed, such as a loss of NaN. The command exits with code 1."""


def nearest(name: str, candidates: Iterable[str]) -> str:
    """Returns ``'; did you mean "npo"?'`` for the candidate closest to `name`, or ``''`` if none is close."""
    match = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.5)
    return f"; did you mean {quoted(match[0])}?" if match else ""


def quoted(text: object, max_length: int = 80) -> str:
    """Quotes untrusted text for an error message: truncated, on one line, without terminal control characters."""
    content = str(text)
    return f'"{printable(content if len(content) <= max_length else content[: max_length - 1] + "…")}"'


def shortened(text: str, max_length: int = 300) -> str:
    """Returns a text without its middle if it is longer than `max_length` characters."""
    half = (max_length - 1) // 2
    return text if len(text) <= max_length else f"{text[:half]}…{text[-half:]}"


def printable(text: str) -> str:
    """Escapes everything in untrusted text that a terminal would act on. A non-breaking space stays."""
    return "".join(
        char if char.isprintable() or char == "\u00a0" else char.encode("unicode_escape").decode("ascii")
        for char in text
    )


class Problems:
    """Collects the broken records of a data file so that a reader can skip them and report them at the end.

    A reader without a `Problems` object raises at the first broken record instead.
    """

    MAX_MESSAGES = 10_000  # further problems are only counted

    def __init__(self) -> None:
        self.count = 0
        self.messages: list[str] = []
        self.codes: list[str] = []  # of the listed messages, in the same order

    def add(self, problem: UserError) -> None:
        """Adds one broken record."""
        self.count += 1
        if len(self.messages) < self.MAX_MESSAGES:
            self.messages.append(str(problem))
            self.codes.append(problem.code)

    def __bool__(self) -> bool:
        return self.count > 0

    def summary(self) -> str:
        """Returns ``'Skipped 3 broken records; the first: ...'``, or ``'No broken records'``."""
        records = "record" if self.count == 1 else "records"
        return f"Skipped {self.count} broken {records}; the first: {self.messages[0]}" if self else "No broken records"


def report_problem(problem: UserError, problems: Problems | None) -> None:
    """Adds a broken record to `problems`, or raises it if `problems` is None."""
    if problems is None:
        raise problem
    problems.add(problem)
