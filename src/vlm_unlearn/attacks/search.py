"""Which first word moves a model most, under a budget of answers. The search knows words and hits; models and judges are elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

# (question, word) pairs -> whether each was a hit; None where an answer or its verdict failed
Ask = Callable[[Sequence[tuple[str, str]]], Sequence[bool | None]]


@dataclass
class Tried:
    """What the search knows of one word: a hit or a miss for each question that it was tried on and that could be judged."""

    word: str
    hits: list[bool] = field(default_factory=list)
    failed: int = 0
    rounds: int = 0  # in how many rounds it was tried

    @property
    def share(self) -> float:
        """Hits over judged answers; below every other where nothing could be judged."""
        return sum(self.hits) / len(self.hits) if self.hits else -1.0


@dataclass(frozen=True)
class Point:
    """The leading word after so many answers."""

    answers: int
    word: str
    hits: int
    judged: int


@dataclass(frozen=True)
class Search:
    """What a search found: the words, best first, and how it came to them."""

    words: list[Tried]
    curve: list[Point]
    answers: int


def rounds(words: int) -> int:
    """How often so many words can be halved until one is left."""
    return math.ceil(math.log2(words))


def least_budget(words: int) -> int:
    """The smallest budget with which every word is tried once in every round that it is in."""
    return words * rounds(words)


def sequential_halving(words: Sequence[str], questions: Sequence[str], budget: int, ask: Ask) -> Search:
    """Tries all words on a few questions, keeps the better half, tries those on more, until one is left.

    Sequential halving (Karnin, Koren and Somekh 2013, algorithm 1) with two changes that suit a file of questions. In a round every
    word gets the same questions, so that words differ by wording alone; and a word keeps its earlier hits, because a question that
    was asked need not be asked again. Where the questions run out, the rest of the budget is not spent.

    Args:
        words: different ones; of equals the earlier wins.
        questions: in the order in which they are asked.
        budget: most answers to ask for; at least `least_budget`.

    Raises:
        ValueError: the budget is too small, or there are no words or no questions.
    """
    if not words or not questions or budget < least_budget(len(words)):
        raise ValueError(
            f"{len(words)} words, {len(questions)} questions and a budget of {budget}: too little to search with"
        )
    tried = {word: Tried(word) for word in words}
    alive = list(tried.values())
    curve: list[Point] = []
    answers = used = 0
    for _ in range(rounds(len(words))):
        each = budget // (len(alive) * rounds(len(words)))
        asked = questions[used : used + each]
        used += len(asked)
        found = iter(ask([(question, known.word) for question in asked for known in alive]))
        for known in alive:
            known.rounds += 1
        for _ in asked:
            for known in alive:
                _take(known, next(found))
            answers += len(alive)
            best = max(alive, key=lambda known: known.share)  # the first of equals
            curve.append(Point(answers, best.word, sum(best.hits), len(best.hits)))
        alive = sorted(alive, key=lambda known: -known.share)[: math.ceil(len(alive) / 2)]
    ranked = sorted(tried.values(), key=lambda known: (-known.rounds, known is not alive[0], -known.share))
    return Search(ranked, curve, answers)


def _take(known: Tried, hit: bool | None) -> None:
    if hit is None:
        known.failed += 1
    else:
        known.hits.append(hit)
