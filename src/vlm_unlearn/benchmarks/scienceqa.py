"""ScienceQA (Lu et al. 2022, arXiv 2209.09513): an option letter."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_unlearn.benchmarks.base import Benchmark, BenchmarkQuestion, QuestionScore, register
from vlm_unlearn.benchmarks.official_files import LETTER, record, texts
from vlm_unlearn.errors import UserError, quoted
from vlm_unlearn.store import read_json

LETTERS = "ABCDE"


@register(
    "scienceqa",
    "problems.json of the ScienceQA repository",
    "the download's images/: <split>/<problem id>/image.png; half of the problems have none",
    "pid_splits.json, to take the test split only",
)
class ScienceQA(Benchmark):
    """Share of questions whose option letter is the right one; an answer without a letter is wrong, never a random option."""

    def read_questions(
        self, annotations: Path, questions: Path | None, limit: int | None = None
    ) -> list[BenchmarkQuestion]:
        found = []
        for id, problem in list(self.read_truths(annotations, questions).items())[:limit]:
            entry = record(annotations, "problem", id, problem)
            choices = texts(problem["choices"], entry.where, "choices")
            if not 0 <= problem["answer"] < len(choices) <= len(LETTERS):
                raise UserError(
                    f'{entry.where}: must have up to {len(LETTERS)} "choices" and the number of one as "answer"'
                )
            hint, image = entry.optional_text("hint"), entry.optional_text("image")
            asked = [f"Context: {hint}"] if hint else []
            asked += [
                entry.text("question"),
                *(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)),
                LETTER,
            ]
            file = f"{entry.optional_text('split') or 'test'}/{id}/{image}" if image else None
            found.append(
                BenchmarkQuestion(
                    id, "\n".join(asked), file, id, LETTERS[problem["answer"]], entry.optional_text("subject")
                )
            )
        return found

    def read_truths(self, annotations: Path, questions: Path | None) -> Mapping[str, Any]:
        problems = read_json(annotations)
        if not isinstance(problems, dict) or not problems:
            raise UserError(f"{annotations}: expected an object, problem id -> problem")
        for id, problem in problems.items():
            whole = (
                isinstance(problem, dict)
                and isinstance(problem.get("answer"), int)
                and isinstance(problem.get("choices"), list)
            )
            if not whole:
                raise UserError(
                    f'{annotations}: problem {quoted(id)} must have "choices" and the number of the right one as "answer"'
                )
        if questions is None:
            return problems
        splits = read_json(questions)
        if not isinstance(splits, dict) or not isinstance(splits.get("test"), list):
            raise UserError(f'{questions}: expected {{"test": [...]}}, ScienceQA\'s pid_splits.json')
        wanted = [str(id) for id in splits["test"]]
        lost = [id for id in wanted if id not in problems]
        if lost:
            raise UserError(f"{questions}: problem {quoted(lost[0])} is not in {annotations}")
        return {id: problems[id] for id in wanted}

    def score_answer(self, id: str, truth: Any, text: str, official: bool) -> QuestionScore:
        option = parse_option(text, truth["choices"], official)
        parts = ("image" if truth.get("image") else "text",)
        return QuestionScore(id, float(option == truth["answer"]), id, parts, unparsed=option < 0)


def parse_option(text: str, choices: list[Any] | int, official: bool) -> int:
    """The option's number, 0 the first; -1 where none can be told.

    Official: the letter alone, ``B. ...``, or ``The answer is B.`` said once. By default ``(B)``, ``B)``, ``b`` and an option's own
    words count too.
    """
    count = choices if isinstance(choices, int) else len(choices)
    said = text if official else text.strip()
    if said in LETTERS and len(said) == 1:
        letter = said
    elif len(said) >= 3 and said[0] in LETTERS and said[1:3] == ". ":
        letter = said[0]
    else:
        told = re.findall(
            r"The answer is ([A-Z])." if official else r"[Tt]he (?:correct )?answer is \(?([A-Z])\b", said
        )
        letter = told[0] if len(told) == 1 else ""
    if not letter and not official:
        opened = re.match(r"\(?([A-Ea-e])(?:[).:](?=\s|$)|$)", said)
        letter = opened.group(1).upper() if opened else ""
        if not letter and not isinstance(choices, int):
            same = [
                number
                for number, choice in enumerate(choices)
                if str(choice).strip().rstrip(".").lower() == said.rstrip(".").lower()
            ]
            return same[0] if len(same) == 1 else -1
    return LETTERS.index(letter) if letter and letter in LETTERS[:count] else -1
