"""The text normalisation that VQAv2's and EvalAI's evaluators share, and their leave-one-out accuracy.

Source: the VQA evaluation (Antol et al. 2015, arXiv 1505.00468; code GT-Vision-Lab/VQA) and EvalAI's for TextVQA. The tables are theirs,
quirks included: scores must be equal to theirs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

_NUMBER_WORDS = "zero one two three four five six seven eight nine ten"
NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBER_WORDS.split())}
ARTICLES = ("a", "an", "the")
PUNCTUATION = tuple(';/[]"{}()=+\\_-><@`,?!')
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"(?!<=\d)(\.)(?!\d)")  # as published: meant as a look-behind, it looks for "<=" and a digit

# Contractions that are told without their apostrophe.
_SINGLE = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's I'm I've isn't it'd it'll ma'am
might've mightn't must've mustn't needn't not've o'clock oughtn't shan't should've shouldn't somebody'd somebody'll somebody's someone'd
someone'll someone's something'd something'll that's there'd there're there's they'd they'll they're they've 'twas wasn't we've weren't
what'll what're what's what've when's where'd where's where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all
you'd you'll you're you've
"""
# Contractions of three words, told with either apostrophe missing.
_DOUBLE = """
couldn't've hadn't've he'd've I'd've it'd've mightn't've she'd've shouldn't've someone'd've something'd've there'd've they'd've we'd've
who'd've wouldn't've you'd've
"""


def _contractions() -> dict[str, str]:
    found = {word.replace("'", ""): word for word in _SINGLE.split()}
    for word in _DOUBLE.split():
        head, middle, tail = word.split("'")
        found |= {f"{head}{middle}'{tail}": word, f"{head}'{middle}{tail}": word}
    found |= {"somebody'dve": "somebody'd've", "y'allll": "y'all'll", "yall'll": "y'all'll"}
    found |= dict.fromkeys(("yall'd've", "y'alld've", "y'all'dve"), "y'all'd've")
    return found | dict.fromkeys(("ow's'at", "'ows'at", "'ow'sat"), "'ow's'at")


CONTRACTIONS = _contractions()


def strip_punctuation(text: str) -> str:
    """Takes punctuation out: away where it stands beside a space or the text has a number with a comma, else a space in its place."""
    number = _COMMA_IN_NUMBER.search(text) is not None
    out = text
    for mark in PUNCTUATION:
        beside_space = mark + " " in text or " " + mark in text
        out = out.replace(mark, "" if beside_space or number else " ")
    # As published: the flag given in the place of the count takes out 32 full stops at most.
    return _FULL_STOP.sub("", out, count=32)


def normalize_words(text: str) -> str:
    """Lower case, numbers as digits, no articles, contractions with their apostrophe."""
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def normalize_evalai(text: str) -> str:
    """EvalAI's normalisation of an answer, for TextVQA and VizWiz."""
    lowered = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return normalize_words(strip_punctuation(one_line(lowered)))


def leave_one_out(prediction: str, answers: Sequence[str]) -> float:
    """The mean, over the annotators, of ``min(1, matches / 3)`` among the others' answers (arXiv 1505.00468, section 3)."""
    matches = sum(answer == prediction for answer in answers)
    return sum(min(1.0, (matches - (answer == prediction)) / 3) for answer in answers) / len(answers)


def server_submission(answers: Mapping[str, str | None], key: str) -> list[dict[str, str | int]]:
    """Answers as the servers of VQAv2, TextVQA and VizWiz take them, ``[{key: id, "answer": ...}]``, normalised as LLaVA-1.5's were."""

    def id_of(id: str) -> str | int:
        return int(id) if key == "question_id" and id.isdecimal() else id

    return [{key: id_of(id), "answer": normalize_evalai(text or "")} for id, text in answers.items()]
