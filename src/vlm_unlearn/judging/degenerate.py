"""Finds answers that say nothing: empty, no words, or one phrase over and over. Every judge asks this first."""

from __future__ import annotations

import re
from collections import Counter

_WORD = re.compile(r"[^\W\d_]+", re.UNICODE)


def degenerate_reason(text: str) -> str | None:
    """Why an answer is degenerate, or None.

    Returns:
        ``"empty"``; ``"no words"``; ``"repeats"`` when one word, or one run of two to four words, fills more than half of an
        answer of eight words or more.
    """
    if not text.strip():
        return "empty"
    words = [word.lower() for word in _WORD.findall(text)]
    if not words:
        return "no words"
    if len(words) < 8:
        return None
    for length in range(1, 5):
        runs = Counter(tuple(words[start : start + length]) for start in range(len(words) - length + 1))
        if max(runs.values()) * length > len(words) / 2 and max(runs.values()) > 2:
            return "repeats"
    return None
