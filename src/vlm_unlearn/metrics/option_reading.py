"""Reads the option letter of a multiple-choice answer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from vlm_unlearn.metrics.answer_reading import (
    ANSWER_WORD,
    FINAL_LABEL,
    FIRST_LABEL,
    IS,
    final_answer,
    marked_answers,
    plain_text,
    single,
)

_SEPARATOR = r"(?:\s*(?:,|/|&|;|\+|\||\band\b|\bor\b|\bund\b|\boder\b|\bet\b|\bou\b|\by\b|和|或))+\s*"
_PREFIX = (
    r"(?:(?:clearly|definitely|probably|likely|most likely|therefore|simply)\s+)?"
    r"(?:(?:the\s+)?(?:option|choice|letter|answer)\s*:?\s*)?"
)
_LETTER = r"[(\[{<]?\s*(?P<letter>[A-Za-z])\s*[)\]}>]?(?![A-Za-z0-9_'])"
_REST = r"(?P<rest>[^\n]*)"
_DECLARED = [
    re.compile(pattern + _LETTER + _REST, re.IGNORECASE)
    for pattern in (
        rf"{ANSWER_WORD}(?:\s+(?:choice|option|letter))?(?:\s+to\s+(?:the|this)\s+question)?{IS}{_PREFIX}",
        r"\b(?:correct|right|best|chosen|final|likely|appropriate)\s+(?:option|choice|letter|one|statement)"
        rf"{IS}{_PREFIX}",
        r"\b(?:i|we)(?:'d|'ll|\s+would|\s+will)?\s+(?:choose|chose|pick|picked|select|selected|say|go\s+with|went\s+with)"
        rf"\s+{_PREFIX}",
        rf"\b(?:it's|it\s+is|it\s+must\s+be)\s+{_PREFIX}",
        r"(?:选项?|选择)\s*(?:是|为|:)?\s*",
        rf"\b(?:option|choice|selection|letter|response|ans)\.?{IS}{_PREFIX}",
        r"(?:\A|\n)\s*(?:choose|select|pick|ans\.)\s+(?:option\s+)?",
    )
]
# "So B.", where the letter ends the sentence.
_CONCLUDED = re.compile(
    r"\b(?:[Ss]o|[Tt]hus|[Hh]ence|[Tt]herefore)[,:]?\s+[(\[]?(?P<letter>[A-Z])[)\]]?(?P<rest>)(?=\s*[.!]?\s*(?:\n|\Z))"
)
_IS_CORRECT = re.compile(
    r"(?<![\w'])(?:(?:option|choice|answer|letter)\s+)?[(\[]?(?P<letter>[A-Z])[)\]]?"
    r"\s*(?:\([^)\n]*\)\s*|[-:–,]\s[^.\n]{0,80}?)?"
    r"\s*is\s+(?:clearly\s+|therefore\s+)?(?:the\s+)?(?:correct|right|best|true|answer|most\s+likely)\b(?P<rest>)",
)
_LEADING = re.compile(
    r"\A(?:[-•]\s+|\d+[.)]\s+)?(?:(?:option|choice|letter|answer|选项|选)\s*[:#]?\s*)?"
    r"[(\[{<']?\s*(?P<letter>[A-Za-z])\s*[)\]}>']?"
    r"(?P<rest>(?:\s*\Z|\s*\n|[.:,;)\]!](?=\s|\Z)|\s+[-–—=]+\s|\s*(?=\()|\s+(?=(?:because|since|as it)\b)).*)",
    re.DOTALL | re.IGNORECASE,
)
_OTHER_LETTER = re.compile(
    rf"(?:\s*[.(]?{_SEPARATOR}(?:(?:maybe|possibly|perhaps|even|also|else)\s+)?(?:(?:option|choice|answer)\s+)?"
    r"|\s*[-–]\s*)[(\[]?(?P<letter>[A-Z])[)\]]?(?=\s*(?:\Z|[.,;:!?)\]\n]|or\b|and\b|are\b|both\b))"
    r"|\s*\n\s*(?P<alone>[A-Z])\s*(?:\n|\Z)"
)
_ARTICLE_FOLLOWERS = re.compile(r"\s*(?:\Z|[.,;:!)\]\n(–—-]|because\b|since\b|as\b|for\b|which\b|with\b|due\b|based\b)")
_OPTION_LINE = re.compile(r"^\s*(?:[Oo]ption\s+)?[(\[]?([A-Z])[)\].:]\s+\S", re.MULTILINE)


def read_option(text: str, options: Mapping[str, str] | Iterable[str]) -> str | None:
    """Returns the letter of the option that a multiple-choice answer names.

    A letter counts in any usual decoration, such as ``Answer: **B**``, ``\\boxed{B}``, ``(B)`` or ``B, because ...``,
    and so does the complete text of one option. A result that the answer marks as final counts before other letters.

    Args:
        text: The answer.
        options: The text of each option by its letter, or the letters alone.

    Returns:
        The letter, or None if the answer names no option, several, or a letter without an option.
    """
    answer = final_answer(text)
    if answer is None or not answer.strip():
        return None
    texts = {letter: options[letter] if isinstance(options, Mapping) else "" for letter in options}
    marked = marked_answers(answer)
    if marked:
        return single(_declared_option(plain_text(item), texts) for item in marked)
    return _declared_option(plain_text(answer), texts)


def _declared_option(answer: str, options: Mapping[str, str]) -> str | None:
    final = list(FINAL_LABEL.finditer(answer))
    if final:
        result = answer[final[-1].end() :].strip()
        return _leading_option(result, options)[0] or _option_by_text(result.partition("\n")[0], options)
    by_text = _option_by_text(answer, options)
    letter, is_clean = _leading_option(answer, options)
    if letter is None and by_text is not None:
        return by_text
    declared: set[str | None] = set()
    for pattern in (*_DECLARED, _CONCLUDED, _IS_CORRECT):
        for match in pattern.finditer(answer):
            if _is_letter(match["letter"], match["rest"], options):
                declared.add(None if _names_other(match["letter"], match["rest"]) else match["letter"].upper())
    if not declared:
        lines = [line for line in answer.splitlines() if line.strip()]
        last = _leading_option(lines[-1].strip(), options) if len(lines) > 1 else (None, False)
        others = {_leading_option(line.strip(), options)[0] for line in lines[:-1]} - {None, last[0]}
        if letter is None and last[1] and not others:
            return last[0]
        return letter if letter is not None else _option_after_label(answer, options)
    option = declared.pop() if len(declared) == 1 else None
    if option is None or option not in options or (is_clean and letter is not None and letter != option):
        return None
    return option


def _leading_option(answer: str, options: Mapping[str, str]) -> tuple[str | None, bool]:
    """Returns the letter at the start of an answer, and whether only the option's text follows on its line."""
    match = _LEADING.match(answer)
    if match is None:
        words = answer.split(maxsplit=1)  # "B Dover"
        repeated = re.fullmatch(r"([A-Z])(?:[\s.,;]+\1)+\.?", answer)
        if repeated and repeated[1] in options:
            return repeated[1], True
        if len(words) == 2 and words[0] in options and _same_text(words[1], options[words[0]]):
            return words[0], True
        return None, False
    letter, rest = match["letter"].upper(), match["rest"].lstrip(")]")
    if letter not in options or _names_other(letter, rest) or (match["letter"].islower() and not _ends(match["rest"])):
        return None, False
    line = rest.strip(" \t.:;,)-–—").split("\n")[0]
    if _repeats_options(answer, options) and line.strip():
        return None, False
    return letter, not line.strip() or _same_text(line, options[letter])


def _names_other(letter: str, rest: str) -> bool:
    """Returns whether another letter follows, as in "A or B"."""
    match = _OTHER_LETTER.match(rest)
    return match is not None and (match["letter"] or match["alone"]) != letter.upper()


def _repeats_options(answer: str, options: Mapping[str, str]) -> bool:
    """Returns whether an answer repeats the list of options, in which no letter stands for a choice."""
    letters = list(dict.fromkeys(_OPTION_LINE.findall(answer)))
    return len(letters) > 1 and letters == list(options)[: len(letters)]


def _is_letter(letter: str, rest: str, options: Mapping[str, str]) -> bool:
    """Returns whether a letter after "the answer is" is an option and not a word, such as the article in "a dog"."""
    if letter.upper() in options and _same_text(rest, options[letter.upper()]):
        return True
    if letter.islower():
        return _ends(rest)
    return letter not in "AI" or _ARTICLE_FOLLOWERS.match(rest) is not None or _OTHER_LETTER.match(rest) is not None


def _ends(rest: str) -> bool:
    return re.match(r"\s*(?:\Z|\n|[).:;,!\]](?:\s|\Z))", rest) is not None


def _option_by_text(answer: str, options: Mapping[str, str]) -> str | None:
    letters = [letter for letter, text in options.items() if text.strip() and _same_text(answer, text)]
    return letters[0] if len(letters) == 1 else None


def _option_after_label(answer: str, options: Mapping[str, str]) -> str | None:
    """Returns the option whose text follows a label, such as ``The answer is Dover.``"""
    label = FIRST_LABEL.match(answer)
    rest = answer[label.end() :].strip() if label else ""
    return _option_by_text(rest.splitlines()[0], options) if rest else None


def _same_text(text: str, option: str) -> bool:
    return bool(option) and _normalized(text) == _normalized(plain_text(option))


def _normalized(text: str) -> str:
    words = text.strip(" \t\n.:;,!)-–—").casefold().split()
    return " ".join(words[1:] if len(words) > 1 and words[0] in ("a", "an", "the") else words)
