"""Reduces a question to what it asks for, so that it can be asked again in other words: rules, offline, deterministic."""

from __future__ import annotations

import re

_POLITE = re.compile(r"^(please|kindly)[ ,]+", re.IGNORECASE)
_ASK_YOU = re.compile(r"^(can|could|would|will) you (please )?", re.IGNORECASE)
# Verbs that only ask for their object: "Share X" asks for X.
_ASKS_FOR = re.compile(
    r"^(share|tell|give|show|describe|explain|provide|list|name|identify|discuss|state|report|present|offer|reveal)( (me|us))?( with)? "
    r"(?!this image |it )(about )?",
    re.IGNORECASE,
)
_WHAT_IS = re.compile(r"^what (exactly )?(is|are|would be|was|were) ", re.IGNORECASE)
_QUESTION = re.compile(
    r"^(what|which|who|whose|whom|where|when|why|how|is|are|was|were|do|does|did|can|could|should|would|will|has|have|had)\b", re.IGNORECASE
)
_HOW_TO = re.compile(r"^how (to|i can|you can|one can|we can) ", re.IGNORECASE)
_WH_CLAUSE = re.compile(r"^(what|which|who|whose|where|when|why|how|if|whether)\b", re.IGNORECASE)
_PREPOSITION = re.compile(r"\b(of|for|on|in|to|about|with|from|by|that|which|who|at|as|and|or|between|against)\b", re.IGNORECASE)


def requested(question: str) -> str:
    """What a question asks for, as a noun phrase.

    Example:
        ``"Can you share tips on tying knots?"`` gives ``"tips on tying knots"``; ``"Post this image."`` gives
        ``"the way to post this image"``; ``"Is it red?"`` gives ``'the answer to "is it red"'``.
    """
    text = _POLITE.sub("", question.strip().rstrip(" .?!"))
    found = _noun_phrase(text)
    return found if found.split()[-1:] not in ([], ["to"], ["me"], ["us"]) else f'the answer to "{text}"'


def _noun_phrase(text: str) -> str:
    asked_you = _ASK_YOU.match(text)
    text = _POLITE.sub("", _ASK_YOU.sub("", text))
    if not asked_you and (match := _WHAT_IS.match(text)):
        return text[match.end() :]
    if not asked_you and _QUESTION.match(text):
        return f'the answer to "{_lower_first(text)}"'
    if match := _ASKS_FOR.match(text):
        text = text[match.end() :]
    else:
        return f"the way to {_lower_first(text)}"
    if match := _HOW_TO.match(text):
        return f"the way to {text[match.end() :]}"
    return f'the answer to "{_lower_first(text)}"' if _WH_CLAUSE.match(text) else text


def _lower_first(text: str) -> str:
    return text if text[:2].isupper() else text[:1].lower() + text[1:]


def is_plural(core: str) -> bool:
    """Whether a noun phrase asks for "are"."""
    head = _PREPOSITION.split(core, maxsplit=1)[0].split()
    return bool(head) and head[-1].lower().endswith("s") and not head[-1].lower().endswith(("ss", "this", "is", "us"))
