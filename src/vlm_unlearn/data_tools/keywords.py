"""Keywords of harm topics, and a fast search for them in texts."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from vlm_unlearn.errors import UserError, quoted
from vlm_unlearn.store import digest_json, read_text

DEFAULT_CATEGORY = "other"  # of the keywords before the first line in brackets
MAX_FILE_BYTES = 1 << 20
MAX_KEYWORDS = 5000
MAX_KEYWORD_LENGTH = 100  # characters
EXCERPT_CHARACTERS = 60  # on each side of a keyword
# Lower case, with a space for everything but letters and digits. str.translate is fast for ASCII texts.
_ASCII = str.maketrans({char: chr(char).lower() if chr(char).isalnum() else " " for char in range(128)})
_SEPARATORS = re.compile(r"[\W_]+")
# Scripts that are written without spaces between words: Thai to Myanmar, Khmer, Chinese, Japanese and Korean.
_UNSPACED = re.compile("[\u0e00-\u109f\u1780-\u17ff\u2e80-\ud7ff\uf900-\ufaff\U00020000-\U0003ffff]")


class Keyword(NamedTuple):
    """A word or phrase, and the harm topic that it belongs to."""

    text: str
    category: str


class KeywordList:
    """Searches texts for keywords.

    A keyword matches complete words, in any case. A ``*`` at its end stands for any ending of the last word. A space in
    it matches any white space or punctuation. In scripts without spaces between words, it matches anywhere.

    Args:
        keywords: The keywords. Those that are equal after normalization count as the first of them.

    Attributes:
        keywords: The distinct keywords.
        digest: The SHA-256 of the keywords and their categories.
    """

    def __init__(self, keywords: Sequence[Keyword]) -> None:
        by_pattern: dict[str, Keyword] = {}
        for keyword in keywords:
            by_pattern.setdefault(_pattern(keyword.text), keyword)
        self.keywords = tuple(by_pattern.values())
        self.digest = digest_json([list(keyword) for keyword in self.keywords])
        self._patterns = {keyword: re.compile(pattern) for pattern, keyword in by_pattern.items()}
        # Each pattern of words starts with a space. Grouping by the next character makes the search three times faster.
        suffixes: dict[str, list[str]] = {}
        for pattern in by_pattern:
            if pattern.startswith(" "):
                suffixes.setdefault(pattern[1], []).append(pattern[2:])
        groups = (f"{re.escape(char)}(?:{'|'.join(endings)})" for char, endings in suffixes.items())
        self._words = re.compile(f" (?:{'|'.join(groups)})" if suffixes else "(?!)")
        unspaced = [pattern for pattern in by_pattern if not pattern.startswith(" ")]
        self._unspaced = re.compile("|".join(unspaced)) if unspaced else None

    def search(self, text: str) -> list[Keyword]:
        """Returns the keywords that a text contains, in the order of the list."""
        normalized = _normalize(text)
        if not self._words.search(normalized) and not (self._unspaced and self._unspaced.search(normalized)):
            return []
        return [keyword for keyword, pattern in self._patterns.items() if pattern.search(normalized)]

    def excerpt(self, text: str, keyword: Keyword) -> str:
        """Returns the part of a text around the first occurrence of a keyword."""
        normalized = _normalize(text)
        match = self._patterns[keyword].search(normalized)
        if match is None:
            return ""
        # The normalized text has a space before the first character. Other texts than ASCII change their length.
        source, start, end = (text, match.start(), match.end() - 1) if text.isascii() else (normalized, *match.span())
        start, end = max(0, start - EXCERPT_CHARACTERS), end + EXCERPT_CHARACTERS
        return " ".join(f"{'…' if start else ''}{source[start:end]}{'…' if end < len(source) else ''}".split())


def _normalize(text: str) -> str:
    """Returns a text in lower case with spaces instead of punctuation, between two spaces."""
    if text.isascii():
        return f" {text.translate(_ASCII)} "
    return f" {_SEPARATORS.sub(' ', unicodedata.normalize('NFKC', text).lower())} "


def _pattern(keyword: str) -> str:
    """Returns the regular expression of a keyword for normalized texts. That of words starts with a space."""
    words = [re.escape(word) for word in _normalize(keyword).split()]
    pattern = " +".join(words)
    if _UNSPACED.search(keyword):
        return pattern
    return f" {pattern}" if keyword.rstrip().endswith("*") else f" {pattern}(?= )"


def read_keywords(path: Path | None = None) -> KeywordList:
    """Reads a list of keywords: a text file with one keyword or phrase per line.

    A line in brackets, such as ``[weapons]``, begins a category. Lines that start with ``#`` are comments.

    Args:
        path: The file. None reads the list of this package.

    Raises:
        UserError: The file is too large, a line is not a keyword, or there is no keyword.
    """
    if path is None:
        text = (files("vlm_unlearn.data_tools") / "filter_keywords.txt").read_text(encoding="utf-8")
    else:
        if path.is_file() and path.stat().st_size > MAX_FILE_BYTES:
            raise UserError(f"is larger than {MAX_FILE_BYTES >> 20} MB. Shorten it.", code="out-of-range", file=path)
        text = read_text(path)
    category = DEFAULT_CATEGORY
    keywords: list[Keyword] = []
    for number, raw in enumerate(text.splitlines(), start=1):
        line = raw.strip().removeprefix("\ufeff")
        if not line or line.startswith("#"):
            continue
        if line.startswith("[") and line.endswith("]"):
            category = line[1:-1].strip() or DEFAULT_CATEGORY
            continue
        problem = _problem(line)
        if problem is None and len(keywords) == MAX_KEYWORDS:
            problem = f"the list has more than {MAX_KEYWORDS:,} keywords. Shorten it."
        if problem:
            raise UserError(problem, code="invalid-field", file=path, record=number)
        keywords.append(Keyword(line, category))
    if not keywords:
        raise UserError("contains no keyword. Write one per line.", code="no-records", file=path)
    return KeywordList(keywords)


def _problem(line: str) -> str | None:
    if len(line) > MAX_KEYWORD_LENGTH:
        return f"the keyword {quoted(line, 40)} is longer than {MAX_KEYWORD_LENGTH} characters. Shorten it."
    if "*" in line.removesuffix("*"):
        return f"the keyword {quoted(line)} has a * that is not at its end. Remove it."
    if not _normalize(line).strip():
        return f"the keyword {quoted(line)} contains no letter or digit. Remove it, or start a comment with #."
    return None
