"""ScienceQA (Lu et al. 2022, arXiv 2209.09513): multiple choice, answered with an option letter."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_unlearn.benchmarks.base import Benchmark, BenchmarkQuestion, QuestionScore, register
from vlm_unlearn.benchmarks.official_files import LETTER, question_objects, record, text_list
from vlm_unlearn.errors import UserError, quoted
from vlm_unlearn.metrics.option_reading import read_option
from vlm_unlearn.store import read_json

LETTERS = "ABCDE"


@register(
    "scienceqa",
    "problems.json of the ScienceQA repository",
    "the download's images/: <split>/<problem id>/image.png; half of the problems have none",
    "pid_splits.json, to select the test split",
)
class ScienceQA(Benchmark):
    """Share of questions with the right option letter.

    An answer without a letter is wrong. The official code chooses a random option instead.
    """

    def read_questions(
        self, annotations: Path, questions: Path | None, limit: int | None = None
    ) -> list[BenchmarkQuestion]:
        benchmark_questions = []
        for id, problem in list(self.read_truths(annotations, questions).items())[:limit]:
            entry = record(annotations, id, problem)
            choices = text_list(entry, "choices")
            if not 0 < len(choices) <= len(LETTERS):
                raise entry.error(f"must be a list of 1 to {len(LETTERS)} texts", "invalid-field", "choices")
            if not 0 <= problem["answer"] < len(choices):
                raise entry.error("must be the index of a choice", "invalid-field", "answer")
            hint, image = entry.optional_text("hint"), entry.optional_text("image")
            lines = [f"Context: {hint}"] if hint else []
            lines.append(entry.text("question"))
            lines += [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
            lines.append(LETTER)
            file = f"{entry.optional_text('split') or 'test'}/{id}/{image}" if image else None
            reference, category = LETTERS[problem["answer"]], entry.optional_text("subject")
            benchmark_questions.append(BenchmarkQuestion(id, "\n".join(lines), file, id, reference, category))
        return benchmark_questions

    def read_truths(self, annotations: Path, questions: Path | None) -> Mapping[str, Any]:
        problems = question_objects(read_json(annotations), annotations)
        for id, value in problems.items():
            problem = record(annotations, id, value)
            if not isinstance(value.get("answer"), int):
                raise problem.error("must be the index of a choice", "invalid-field", "answer")
            if not isinstance(value.get("choices"), list):
                raise problem.error("must be a list of texts", "invalid-field", "choices")
        if questions is None:
            return problems
        splits = read_json(questions)
        if not isinstance(splits, dict) or not isinstance(splits.get("test"), list):
            raise UserError(
                'expected {"test": [...]}. Pass ScienceQA\'s pid_splits.json.', code="invalid-field", file=questions
            )
        test_ids = [str(id) for id in splits["test"]]
        missing_ids = [id for id in test_ids if id not in problems]
        if missing_ids:
            raise UserError(
                f"the problem {quoted(missing_ids[0])} is not in {annotations}. Pass two files of the same release.",
                code="run-mismatch",
                file=questions,
            )
        return {id: problems[id] for id in test_ids}

    def score_answer(self, id: str, truth: Any, text: str, official: bool) -> QuestionScore:
        option = parse_option(text, truth["choices"], official)
        subsets = ("image" if truth.get("image") else "text",)
        return QuestionScore(id, float(option == truth["answer"]), id, subsets, unparsed=option < 0)


def parse_option(text: str, choices: list[Any] | int, official: bool) -> int:
    """Returns the index of the option that an answer names, or -1 if it names none or several.

    Args:
        text: The answer.
        choices: The options, or their number.
        official: Accept only what the official code accepts: a letter alone, ``B. ...``, or a single ``The answer is
            B.``. By default the answer is read by `read_option`.
    """
    options = ["" for _ in range(choices)] if isinstance(choices, int) else [str(choice) for choice in choices]
    letters = LETTERS[: len(options)]
    if not official:
        letter = read_option(text, dict(zip(letters, options, strict=False)))
        return -1 if letter is None else letters.index(letter)
    if text in LETTERS and len(text) == 1:
        letter = text
    elif len(text) >= 3 and text[0] in LETTERS and text[1:3] == ". ":
        letter = text[0]
    else:
        matches = re.findall(r"The answer is ([A-Z]).", text)
        letter = matches[0] if len(matches) == 1 else ""
    return LETTERS.index(letter) if letter and letter in letters else -1
