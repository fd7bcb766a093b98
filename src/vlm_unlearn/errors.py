"""The two errors a user meets: a wrong request (exit code 2) and work that failed (exit code 1)."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RequestError(Exception):
    """The request was wrong: bad data, an unknown name, a missing file.

    The message is one line that says what, where and how to mend it.
    """


class WorkError(Exception):
    """The request was right but the work failed, for instance because the loss became NaN."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns ``'; did you mean "npo"?'`` for the known name closest to `name`, or ``''``."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {shown(match[0])}?" if match else ""


def shown(text: object, longest: int = 80) -> str:
    """Text of a data file as an error message quotes it: cut, on one line, nothing in it that a terminal would act on."""
    cut = str(text)
    return f'"{printable(cut if len(cut) <= longest else cut[: longest - 1] + "…")}"'


def printable(text: str) -> str:
    """Text of others on one line, without what a terminal would act on; a blank that doesn't break stays."""
    return "".join(char if char.isprintable() or char == "\u00a0" else char.encode("unicode_escape").decode("ascii") for char in text)


class Problems:
    """Broken records of a data file: each is listed by name, and the rest goes on.

    A reader that is given none raises at the first broken record instead.
    """

    LISTED = 10_000  # the count goes on beyond

    def __init__(self) -> None:
        self.count = 0
        self.messages: list[str] = []

    def add(self, problem: RequestError | str) -> None:
        """Takes note of one broken record."""
        self.count += 1
        if len(self.messages) < self.LISTED:
            self.messages.append(str(problem))

    def __bool__(self) -> bool:
        return self.count > 0

    def summary(self) -> str:
        """``'3 broken records were left out; the first: ...'``"""
        records = "record was" if self.count == 1 else "records were"
        return f"{self.count} broken {records} left out; the first: {self.messages[0]}" if self else "no broken records"


def refuse(problem: RequestError, problems: Problems | None) -> None:
    """Lists a broken record, or raises it where nobody lists."""
    if problems is None:
        raise problem
    problems.add(problem)
