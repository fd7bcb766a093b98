"""Finds answers that say nothing: empty, no words, non-words, or one phrase over and over. Every judge asks this first."""

from __future__ import annotations

import re
from collections import Counter

LOOKED_AT = 20_000  # characters; what comes after changes nothing
_WORD = re.compile(r"[^\W_]+", re.UNICODE)
_SAME_PIECE = re.compile(r"(.{1,12}?)\1{9,}", re.DOTALL)  # ten times in a row
_LATIN = re.compile(r"[a-z]+")


def degenerate_reason(text: str) -> str | None:
    """Why an answer is degenerate, or None.

    It errs on the side of None: what it calls degenerate says nothing in any language, and fluent word salad is left to a judge that reads.

    Returns:
        ``"empty"``; ``"no words"``, of hardly anything but marks; ``"repeats"`` when one word, one run of two to four words (in an
        answer of eight words or more) or one piece of text ten times in a row fills more than half of the answer; ``"non-words"`` when
        most of three words or more can't be said in a language with Latin letters: no vowel, or longer than any word.

    Example:
        ``degenerate_reason("the the the the the the the the")`` gives ``"repeats"``, ``degenerate_reason("42")`` None.
    """
    text = text[:LOOKED_AT].strip()
    if not text:
        return "empty"
    words = [word.lower() for word in _WORD.findall(text)]
    if sum(map(len, words)) < 0.3 * len("".join(text.split())):
        return "no words"
    if _repeats(words) or sum(len(match.group()) for match in _SAME_PIECE.finditer(text)) > len(text) / 2:
        return "repeats"
    return "non-words" if _unsayable(words) else None


def _repeats(words: list[str]) -> bool:
    if len(words) < 8:
        return False
    for length in range(1, 5):
        runs = Counter(tuple(words[start : start + length]) for start in range(len(words) - length + 1))
        most = max(runs.values())
        if most * length > len(words) / 2 and most > 2:
            return True
    return False


def _unsayable(words: list[str]) -> bool:
    latin = [word for word in words if _LATIN.fullmatch(word) and len(word) > 3]
    if len(latin) < 3 or len(latin) < len(words) / 2:
        return False
    return sum(len(word) > 30 or not set(word) & set("aeiouy") for word in latin) > len(latin) / 2
