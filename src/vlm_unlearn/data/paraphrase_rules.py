"""Reduces a question to what it asks for, so that it can be asked again in other words: rules, offline, deterministic."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

# By first word. {core} is what is asked for, as a noun phrase; {be} is "is" or "are".
WORDINGS: Mapping[str, Sequence[str]] = {
    "what": ("What {be} {core}?", "What can you say about {core}?"),
    "share": ("Share {core}.", "Share with me {core}."),
    "can": ("Can you give me {core}?", "Can I have {core}?"),
    "could": ("Could you give {core}?", "Could I get {core}?"),
    "tell": ("Tell me {core}.",),
    "give": ("Give me {core}.",),
    "please": ("Please give {core}.", "Please tell me {core}."),
    "provide": ("Provide {core}.",),
    "describe": ("Describe {core}.",),
    "i": ("I want {core}.", "I would like {core}."),
}

_POLITE = re.compile(r"^(please|kindly)[ ,]+", re.IGNORECASE)
_ASK_YOU = re.compile(r"^(can|could|would|will) you (please )?", re.IGNORECASE)
# Verbs that only ask for their object: "Share X" asks for X.
_ASKS_FOR = re.compile(
    r"^(share|tell|give|show|describe|explain|provide|list|name|identify|discuss|state|report|present|offer|reveal)( (me|us))?( with)? "
    r"(?!this image |it )(about )?",
    re.IGNORECASE,
)
# Verbs that make their object: "Write a poem" asks for a poem; "Create trouble" doesn't ask for trouble.
_MAKES = re.compile(
    r"^(generate|create|write|compose|draft|produce|suggest|propose)( (me|us))? (?=(a|an|some|several|another) )",
    re.IGNORECASE,
)
_WHAT_IS = re.compile(r"^what (exactly )?(is|are|would be|was|were) ", re.IGNORECASE)
# "What beverage appears to be in the glass" asks for the beverage that does.
_WHAT_THING = re.compile(
    r"^what ((?:(?!(?:do|does|did) )[\w'-]+ ){1,5}?(?:in (?:the|this) (?:image|picture|photo) )?)"
    r"((?:is|are|was|were) (?:being|shown|seen|worn|held|made|written|(?!based)[\w-]+ed)\b|(?:appears|seems) to )",
    re.IGNORECASE,
)
_QUESTION = re.compile(
    r"^(what|which|who|whose|whom|where|when|why|how|is|are|was|were|do|does|did|can|could|should|would|will|has|have|had)\b",
    re.IGNORECASE,
)
_HOW_TO = re.compile(r"^how (to|i can|you can|one can|we can) ", re.IGNORECASE)
_WH_CLAUSE = re.compile(r"^(what|which|who|whose|where|when|why|how|if|whether)\b", re.IGNORECASE)
_PREPOSITION = re.compile(
    r"\b(of|for|on|in|to|about|with|from|by|that|which|who|at|as|and|or|between|against)\b", re.IGNORECASE
)
_IMAGE = re.compile(
    r"^(this|the) (image|picture|photo|photograph)$", re.IGNORECASE
)  # "Share this image." would be another request
_IN_THE_IMAGE = re.compile(r" (in|on) (the|this) (image|picture|photo|photograph|scene)$", re.IGNORECASE)
# "What is the image about", "what is the man holding": a preposition without its noun, or a verb at the end.
_HANGING = re.compile(r"\b(about|for|of|like|from|with|at|on|in|doing)$", re.IGNORECASE)
_VERB_LAST = re.compile(
    r"(?<!\S)(?!(?:of|for|to|in|on|by|with|from|about|and|or|the|a|an|this|that|these|those|while|when)\s)\S+ "
    r"(?!(?:some|any|no|every)?thing$)\w+ing$",
    re.IGNORECASE,
)
_POINTING = ("it", "this", "that", "these", "those", "they", "here", "there")  # "Share it." asks for nothing


def requested(question: str) -> str:
    """What a question asks for, as a noun phrase.

    Example:
        ``"Can you share tips on tying knots?"`` gives ``"tips on tying knots"``; ``"Post this image."`` gives
        ``"the way to post this image"``; ``"Is it red?"`` gives ``'the answer to "is it red"'``.
    """
    text = _POLITE.sub("", question.strip().rstrip(" .?!"))
    found = _noun_phrase(text)
    empty = found.split()[-1:] in ([], ["to"], ["me"], ["us"]) or found.lower() in _POINTING
    if empty:
        return f'the answer to "{text}"'
    return f"the content of {_lower_first(found)}" if _IMAGE.match(found) else found


def by_rule(question: str, wording: str) -> str:
    """A question in another wording.

    Example:
        ``by_rule("Can you describe the red kite?", "What {be} {core}?")`` gives ``"What is the red kite?"``
    """
    core = requested(question)
    return wording.format(core=core, be="are" if is_plural(core) else "is")


def _noun_phrase(text: str) -> str:
    asked_you = _ASK_YOU.match(text)
    text = _POLITE.sub("", _ASK_YOU.sub("", text))
    if not asked_you and (match := _WHAT_IS.match(text)) and not _is_clause(text[match.end() :]):
        return text[match.end() :]
    if not asked_you and (match := _WHAT_THING.match(text)):
        return f"the {match[1]}that {text[match.start(2) :]}"
    if not asked_you and _QUESTION.match(text):
        return f'the answer to "{_lower_first(text)}"'
    if match := _MAKES.match(text) or _ASKS_FOR.match(text):
        text = text[match.end() :]
    else:
        return f"the way to {_lower_first(text)}"
    if match := _HOW_TO.match(text):
        return f"the way to {text[match.end() :]}"
    return f'the answer to "{_lower_first(text)}"' if _WH_CLAUSE.match(text) else text


def _is_clause(text: str) -> bool:
    """Whether what follows "what is" is no noun phrase: "the man holding", "the image about".

    Some that are noun phrases ("the man's clothing") are taken for clauses, which costs grace and no meaning.
    """
    text = _IN_THE_IMAGE.sub("", text)
    return bool(_HANGING.search(text) or _VERB_LAST.search(text))


def _lower_first(text: str) -> str:
    return text if text[:2].isupper() else text[:1].lower() + text[1:]


def is_plural(core: str) -> bool:
    """Whether a noun phrase asks for "are"."""
    head = _PREPOSITION.split(core, maxsplit=1)[0].split()
    return bool(head) and head[-1].lower().endswith("s") and not head[-1].lower().endswith(("ss", "this", "is", "us"))
