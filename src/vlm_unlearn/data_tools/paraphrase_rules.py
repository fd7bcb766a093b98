"""Rephrases questions by rules, offline and deterministically.

A question is reduced to the content that it requests, a noun phrase. A wording with another first word then asks for
that content.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

# By first word. {core} is the requested content as a noun phrase, and {be} is "is" or "are".
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
_CAN_YOU = re.compile(r"^(can|could|would|will) you (please )?", re.IGNORECASE)
# Verbs that request their object: "Share X" requests X.
_REQUEST_VERB = re.compile(
    r"^(share|tell|give|show|describe|explain|provide|list|name|identify|discuss|state|report|present|offer|reveal)"
    r"( (me|us))?( with)? (?!this image |it )(about )?",
    re.IGNORECASE,
)
# Verbs that produce their object: "Write a poem" requests a poem, but "Create trouble" does not request trouble.
_PRODUCING_VERB = re.compile(
    r"^(generate|create|write|compose|draft|produce|suggest|propose)( (me|us))? (?=(a|an|some|several|another) )",
    re.IGNORECASE,
)
_WHAT_IS = re.compile(r"^what (exactly )?(is|are|would be|was|were) ", re.IGNORECASE)
# "What beverage appears to be in the glass" requests the beverage that appears to be in the glass.
_WHAT_NOUN = re.compile(
    r"^what ((?:(?!(?:do|does|did) )[\w'-]+ ){1,5}?(?:in (?:the|this) (?:image|picture|photo) )?)"
    r"((?:is|are|was|were) (?:being|shown|seen|worn|held|made|written|(?!based)[\w-]+ed)\b|(?:appears|seems) to )",
    re.IGNORECASE,
)
_QUESTION = re.compile(
    r"^(what|which|who|whose|whom|where|when|why|how|"
    r"is|are|was|were|do|does|did|can|could|should|would|will|has|have|had)\b",
    re.IGNORECASE,
)
_HOW_TO = re.compile(r"^how (to|i can|you can|one can|we can) ", re.IGNORECASE)
_WH_CLAUSE = re.compile(r"^(what|which|who|whose|where|when|why|how|if|whether)\b", re.IGNORECASE)
_PREPOSITION = re.compile(
    r"\b(of|for|on|in|to|about|with|from|by|that|which|who|at|as|and|or|between|against)\b", re.IGNORECASE
)
# Not requested as it is: "Share this image." would be a different request.
_IMAGE = re.compile(r"^(this|the) (image|picture|photo|photograph)$", re.IGNORECASE)
_IN_THE_IMAGE = re.compile(r" (in|on) (the|this) (image|picture|photo|photograph|scene)$", re.IGNORECASE)
# "What is the image about" and "what is the man holding" end with a preposition without its noun, or with a verb.
_TRAILING_PREPOSITION = re.compile(r"\b(about|for|of|like|from|with|at|on|in|doing)$", re.IGNORECASE)
_TRAILING_VERB = re.compile(
    r"(?<!\S)(?!(?:of|for|to|in|on|by|with|from|about|and|or|the|a|an|this|that|these|those|while|when)\s)\S+ "
    r"(?!(?:some|any|no|every)?thing$)\w+ing$",
    re.IGNORECASE,
)
_PRONOUNS = ("it", "this", "that", "these", "those", "they", "here", "there")  # "Share it." names no content


def requested_content(question: str) -> str:
    """Returns the content that a question requests, as a noun phrase.

    Example:
        ``"Can you share tips on tying knots?"`` gives ``"tips on tying knots"``.
        ``"Post this image."`` gives ``"the way to post this image"``.
        ``"Is it red?"`` gives ``'the answer to "is it red"'``.
    """
    text = _POLITE.sub("", question.strip().rstrip(" .?!"))
    phrase = _noun_phrase(text)
    if phrase.split()[-1:] in ([], ["to"], ["me"], ["us"]) or phrase.lower() in _PRONOUNS:
        return f'the answer to "{text}"'
    return f"the content of {_lower_first(phrase)}" if _IMAGE.match(phrase) else phrase


def rephrase(question: str, wording: str) -> str:
    """Returns a question in another wording.

    Example:
        ``rephrase("Can you describe the red kite?", "What {be} {core}?")`` gives ``"What is the red kite?"``.
    """
    core = requested_content(question)
    return wording.format(core=core, be="are" if is_plural(core) else "is")


def _noun_phrase(text: str) -> str:
    can_you = _CAN_YOU.match(text)
    text = _POLITE.sub("", _CAN_YOU.sub("", text))
    if not can_you and (match := _WHAT_IS.match(text)) and not _is_clause(text[match.end() :]):
        return text[match.end() :]
    if not can_you and (match := _WHAT_NOUN.match(text)):
        return f"the {match[1]}that {text[match.start(2) :]}"
    if not can_you and _QUESTION.match(text):
        return f'the answer to "{_lower_first(text)}"'
    if match := _PRODUCING_VERB.match(text) or _REQUEST_VERB.match(text):
        text = text[match.end() :]
    else:
        return f"the way to {_lower_first(text)}"
    if match := _HOW_TO.match(text):
        return f"the way to {text[match.end() :]}"
    return f'the answer to "{_lower_first(text)}"' if _WH_CLAUSE.match(text) else text


def _is_clause(text: str) -> bool:
    """Returns whether the text after "what is" is a clause, such as "the man holding", instead of a noun phrase.

    Some noun phrases ("the man's clothing") are mistaken for clauses. The result is then less elegant, but its meaning
    stays the same.
    """
    text = _IN_THE_IMAGE.sub("", text)
    return bool(_TRAILING_PREPOSITION.search(text) or _TRAILING_VERB.search(text))


def _lower_first(text: str) -> str:
    return text if text[:2].isupper() else text[:1].lower() + text[1:]


def is_plural(core: str) -> bool:
    """Returns whether the verb of a noun phrase is "are" instead of "is"."""
    head = _PREPOSITION.split(core, maxsplit=1)[0].split()
    return bool(head) and head[-1].lower().endswith("s") and not head[-1].lower().endswith(("ss", "this", "is", "us"))
