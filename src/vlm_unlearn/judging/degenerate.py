"""Detection of degenerate answers: empty, no words, non-words, or repetition. Most judges run it first."""

from __future__ import annotations

import re
from collections import Counter

MAX_CHARACTERS = 20_000  # the rest of a longer answer is not examined
_WORD = re.compile(r"[^\W_]+", re.UNICODE)
_REPEATED_TEXT = re.compile(r"(.{1,12}?)\1{9,}", re.DOTALL)  # ten times in a row
_CONSONANTS = "bcdfghjklmnpqrstvwxz"


def degenerate_reason(text: str) -> str | None:
    """Returns why an answer is degenerate, or None if it is not.

    The test is conservative: only answers without meaning in any language are degenerate. Fluent word salad is left
    to a judge that reads the answer.

    Returns:
        - ``"empty"``: the answer has no characters except white space.
        - ``"no words"``: less than 30 % of the characters are letters or digits.
        - ``"repeats"``: more than half of the answer is one repeated word, one repeated run of two to four words, or
          one piece of text ten times in a row. The tests of words need an answer of at least eight words.
        - ``"non-words"``: most of at least three words cannot be pronounced in a language with Latin letters. They have
          no vowel, or more than 30 letters.

    Example:
        ``degenerate_reason("the the the the the the the the")`` returns ``"repeats"``.
        ``degenerate_reason("42")`` returns None.
    """
    text = text[:MAX_CHARACTERS].strip()
    if not text:
        return "empty"
    words = _WORD.findall(text.lower()) if text.isascii() else [word.lower() for word in _WORD.findall(text)]
    if sum(map(len, words)) < 0.3 * len("".join(text.split())):
        return "no words"
    if _repeats_words(words) or _repeats_text(text):
        return "repeats"
    return "non-words" if _unpronounceable(words) else None


def _repeats_words(words: list[str]) -> bool:
    if len(words) < 8:
        return False
    most_frequent = max(Counter(words).values())
    for length in range(1, 5):
        if most_frequent * length <= len(words) / 2:  # a run occurs at most as often as its rarest word
            continue
        counts = Counter(tuple(words[start : start + length]) for start in range(len(words) - length + 1))
        highest = max(counts.values())
        if highest * length > len(words) / 2 and highest > 2:
            return True
    return False


def _repeats_text(text: str) -> bool:
    if not _has_period(text):  # faster than the search
        return False
    # Ten repetitions of a piece have few different runs of four characters.
    if len(set(zip(text, text[1:], text[2:], text[3:], strict=False))) > 0.7 * len(text) + 4:
        return False
    return sum(len(match.group()) for match in _REPEATED_TEXT.finditer(text)) > len(text) / 2


def _has_period(text: str) -> bool:
    """Returns False only if no piece of up to twelve characters occurs ten times in a row.

    Ten repetitions of a piece contain one of the places that are five pieces apart, with five pieces after it.
    """
    for length in range(1, 13):
        for start in range(0, len(text) - 5 * length + 1, 5 * length):
            middle = start + length
            # Comparing one character first saves most of the slices.
            if text[start] == text[middle] and text[start : start + 4 * length] == text[middle : middle + 4 * length]:
                return True
    return False


def _unpronounceable(words: list[str]) -> bool:
    latin = [word for word in words if len(word) > 3 and word.isascii() and word.isalpha()]
    if len(latin) < 3 or len(latin) < len(words) / 2:
        return False
    # A word without a vowel is empty after consonants are removed from both of its ends.
    return sum(len(word) > 30 or not word.strip(_CONSONANTS) for word in latin) > len(latin) / 2
