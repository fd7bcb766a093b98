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
    return f'; did you mean "{match[0]}"?' if match else ""
