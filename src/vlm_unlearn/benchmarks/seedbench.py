"""SEED-Bench (Li et al. 2023, arXiv 2307.16125): multiple choice about images and the middle frames of videos."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_unlearn.benchmarks.base import Benchmark, BenchmarkQuestion, QuestionScore, register
from vlm_unlearn.benchmarks.official_files import LETTER, entries, entries_by_id, record, require_answers
from vlm_unlearn.errors import UserError
from vlm_unlearn.metrics.option_reading import read_option
from vlm_unlearn.store import read_json

CHOICES = {"A": "choice_a", "B": "choice_b", "C": "choice_c", "D": "choice_d"}


@register(
    "seedbench",
    "SEED-Bench.json of the SEED-Bench download",
    "a folder with SEED-Bench-image/, and for the video questions SEED-Bench-video-image/, as in LLaVA's evaluation",
)
class SEEDBench(Benchmark):
    """Share of questions with the right option letter, over all questions, by question type, and by image and video.

    SEED-Bench's own code ranks the options by their likelihood, so it has no answers. LLaVA's evaluation, which
    `official` follows, takes an answer as right if it is the letter alone.
    """

    def read_questions(
        self, annotations: Path, questions: Path | None, limit: int | None = None
    ) -> list[BenchmarkQuestion]:
        benchmark_questions = []
        for id, truth in list(_read_entries(annotations).items())[:limit]:
            lines = [truth["question"], *(f"{letter}. {text}" for letter, text in truth["options"].items()), LETTER]
            benchmark_questions.append(
                BenchmarkQuestion(
                    id, "\n".join(lines), truth["file"], truth["image"], truth["answer"] or None, truth["type"]
                )
            )
        return benchmark_questions

    def read_truths(self, annotations: Path, questions: Path | None) -> Mapping[str, Any]:
        truths = _read_entries(annotations)
        require_answers([{"answer": 1} for truth in truths.values() if truth["answer"]], annotations, "answer")
        for id, truth in truths.items():
            if truth["answer"] not in truth["options"]:
                problem = "must be the letter of a choice: A, B, C or D"
                raise record(annotations, id, truth).error(problem, "invalid-field", "answer")
        return truths

    def score_answer(self, id: str, truth: Any, text: str, official: bool) -> QuestionScore:
        option = text if official else read_option(text, truth["options"])
        subsets = (truth["type"], truth["data_type"])
        return QuestionScore(id, float(option == truth["answer"]), truth["image"], subsets, unparsed=option is None)


def _read_entries(annotations: Path) -> dict[str, dict[str, Any]]:
    value = read_json(annotations)
    types = value.get("question_type") if isinstance(value, dict) else None
    if not isinstance(types, dict) or "questions" not in value:
        raise UserError(
            'expected {"questions": [...], "question_type": {...}}. Pass SEED-Bench.json.',
            code="invalid-field",
            file=annotations,
        )
    type_names = {str(number): name for name, number in types.items()}
    questions = entries(value["questions"], annotations, "question_id", "question_type_id")
    truths = {}
    for id, question in entries_by_id(questions, annotations, "question_id").items():
        entry = record(annotations, id, question)
        type_id, data_type, image = entry.name("question_type_id"), entry.text("data_type"), entry.name("data_id")
        if data_type not in ("image", "video"):
            raise entry.error("must be image or video", "invalid-field", "data_type")
        file = f"SEED-Bench-image/{image}" if data_type == "image" else f"SEED-Bench-video-image/{type_id}_{id}.png"
        truths[id] = {
            "question": entry.text("question"),
            "options": {letter: entry.name(choice) for letter, choice in CHOICES.items()},  # some are numbers
            "answer": entry.optional_text("answer") or "",
            "type": type_names.get(type_id, f"type {type_id}"),
            "data_type": data_type,
            "image": image,
            "file": file,
        }
    return truths
