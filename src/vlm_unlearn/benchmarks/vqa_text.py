"""The text normalization that the evaluators of VQAv2 and EvalAI share, and their leave-one-out accuracy.

Source: the VQA evaluation (Antol et al. 2015, arXiv 1505.00468; code GT-Vision-Lab/VQA) and EvalAI's evaluation of
TextVQA. The tables are those of the published code, including its quirks, because scores must equal the published ones.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from vlm_unlearn.metrics.answer_reading import read_short_answer

_NUMBER_WORDS = "zero one two three four five six seven eight nine ten"
NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBER_WORDS.split())}
ARTICLES = ("a", "an", "the")
PUNCTUATION = tuple(';/[]"{}()=+\\_-><@`,?!')
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"(?!<=\d)(\.)(?!\d)")  # as published; meant as a look-behind, it matches "<=" and a digit

# Contractions that are recognized without their apostrophe.
_SINGLE = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's I'm I've
isn't it'd it'll ma'am might've mightn't must've mustn't needn't not've o'clock oughtn't shan't should've shouldn't
somebody'd somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're
there's they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd
where's where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're
you've
"""
# Contractions of three words, recognized with either apostrophe missing.
_DOUBLE = """
couldn't've hadn't've he'd've I'd've it'd've mightn't've she'd've shouldn't've someone'd've something'd've there'd've
they'd've we'd've who'd've wouldn't've you'd've
"""


def _contractions() -> dict[str, str]:
    contractions = {word.replace("'", ""): word for word in _SINGLE.split()}
    for word in _DOUBLE.split():
        head, middle, tail = word.split("'")
        contractions |= {f"{head}{middle}'{tail}": word, f"{head}'{middle}{tail}": word}
    contractions |= {"somebody'dve": "somebody'd've", "y'allll": "y'all'll", "yall'll": "y'all'll"}
    contractions |= dict.fromkeys(("yall'd've", "y'alld've", "y'all'dve"), "y'all'd've")
    return contractions | dict.fromkeys(("ow's'at", "'ows'at", "'ow'sat"), "'ow's'at")


CONTRACTIONS = _contractions()


def strip_punctuation(text: str) -> str:
    """Removes punctuation as published.

    A mark is deleted if the text contains it next to a space, or contains a number with a comma. Otherwise a space
    replaces it.
    """
    has_comma_in_number = _COMMA_IN_NUMBER.search(text) is not None
    stripped = text
    for mark in PUNCTUATION:
        is_next_to_space = mark + " " in text or " " + mark in text
        stripped = stripped.replace(mark, "" if is_next_to_space or has_comma_in_number else " ")
    # The published code passes a regex flag in place of the count, so that it removes at most 32 full stops.
    return _FULL_STOP.sub("", stripped, count=32)


def normalize_words(text: str) -> str:
    """Writes words in lower case and numbers as digits, removes articles, and restores apostrophes of contractions."""
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def one_line(text: str) -> str:
    """Replaces line breaks and tabs by spaces, and removes white space at both ends."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def normalize_evalai(text: str) -> str:
    """Normalizes an answer as EvalAI does, for TextVQA and VizWiz."""
    lowered = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return normalize_words(strip_punctuation(one_line(lowered)))


def leave_one_out(prediction: str, answers: Sequence[str]) -> float:
    """Returns the leave-one-out accuracy against the annotators' answers (arXiv 1505.00468, section 3).

    It is the mean, over the annotators, of ``min(1, matches / 3)`` among the answers of the other annotators.
    """
    matches = sum(answer == prediction for answer in answers)
    return sum(min(1.0, (matches - (answer == prediction)) / 3) for answer in answers) / len(answers)


def server_submission(answers: Mapping[str, str | None], key: str) -> list[dict[str, str | int]]:
    """Returns answers in the format of the servers of VQAv2, TextVQA and VizWiz, ``[{key: id, "answer": ...}]``.

    The answers are read by `read_short_answer` and normalized, as those of LLaVA-1.5 were.

    Args:
        answers: Texts by question id. None for a failed answer.
        key: The name of the id. A ``question_id`` is written as an integer.
    """

    def server_id(id: str) -> str | int:
        return int(id) if key == "question_id" and id.isdecimal() else id

    return [
        {key: server_id(id), "answer": normalize_evalai(read_short_answer(text or "") or "")}
        for id, text in answers.items()
    ]
