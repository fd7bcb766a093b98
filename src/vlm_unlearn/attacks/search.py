"""Searches for the first word with the highest hit rate under a budget of answers.

The search handles words and hits only. A callback asks the model and grades its answers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from vlm_unlearn.errors import UserError

# Takes (question, word) pairs and returns whether each is a hit. None: the answer or its verdict failed.
HitFunction = Callable[[Sequence[tuple[str, str]]], Sequence[bool | None]]


@dataclass
class WordResult:
    """The results of one word: a hit or a miss for each question with a graded answer."""

    word: str
    hits: list[bool] = field(default_factory=list)
    failed: int = 0  # questions without a graded answer
    rounds: int = 0  # rounds in which the word was tried

    @property
    def hit_rate(self) -> float:
        """The share of hits among graded answers, or -1 if there are none."""
        return sum(self.hits) / len(self.hits) if self.hits else -1.0


@dataclass(frozen=True)
class Leader:
    """The leading word after a number of answers."""

    answers: int
    word: str
    hits: int
    judged: int


@dataclass(frozen=True)
class SearchResult:
    """The result of a search: all words, best first, and the leading word after each question."""

    words: list[WordResult]
    curve: list[Leader]
    answers: int


def count_rounds(num_words: int) -> int:
    """Returns the number of rounds that halve the words until one is left."""
    return math.ceil(math.log2(num_words))


def min_budget(num_words: int) -> int:
    """Returns the smallest budget with which every word is tried at least once in each of its rounds."""
    return num_words * count_rounds(num_words)


def sequential_halving(words: Sequence[str], questions: Sequence[str], budget: int, ask: HitFunction) -> SearchResult:
    """Finds the word with the highest hit rate by sequential halving.

    All words are tried on a few questions, the better half of them on more questions, and so on until one word is left.
    This is algorithm 1 of Karnin, Koren and Somekh 2013 with two changes for a fixed set of questions:

    - In each round all words get the same questions, so that words differ by their wording alone.
    - A word keeps its earlier hits, and no question is asked twice with the same word.

    If the questions run out, the remaining budget is not used.

    Args:
        words: Different words. Of two words with equal hit rates, the earlier one wins.
        questions: The questions, in the order in which they are asked.
        budget: The maximum number of answers, at least ``min_budget(len(words))``.
        ask: Asks (question, word) pairs and returns whether each is a hit, or None for a failure.

    Raises:
        UserError: The budget is too small, or there are no words or no questions.
    """
    if not words or not questions or budget < min_budget(len(words)):
        raise UserError(
            f"{len(words)} words, {len(questions)} questions and a budget of {budget} are too few for a search",
            code="out-of-range",
        )
    results = {word: WordResult(word) for word in words}
    remaining = list(results.values())
    curve: list[Leader] = []
    num_rounds = count_rounds(len(words))
    answers = num_used = 0
    for _ in range(num_rounds):
        num_questions = budget // (len(remaining) * num_rounds)
        round_questions = questions[num_used : num_used + num_questions]
        num_used += len(round_questions)
        hits = iter(ask([(question, result.word) for question in round_questions for result in remaining]))
        for result in remaining:
            result.rounds += 1
        for _ in round_questions:
            for result in remaining:
                hit = next(hits)
                if hit is None:
                    result.failed += 1
                else:
                    result.hits.append(hit)
            answers += len(remaining)
            best = max(remaining, key=lambda result: result.hit_rate)  # the first of equals
            curve.append(Leader(answers, best.word, sum(best.hits), len(best.hits)))
        remaining = sorted(remaining, key=lambda result: -result.hit_rate)[: math.ceil(len(remaining) / 2)]
    winner = remaining[0]
    ranked = sorted(results.values(), key=lambda result: (-result.rounds, result is not winner, -result.hit_rate))
    return SearchResult(ranked, curve, answers)
