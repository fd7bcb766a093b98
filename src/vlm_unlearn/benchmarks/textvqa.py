"""TextVQA (Singh et al. 2019, arXiv 1904.08920)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_unlearn.benchmarks.base import Benchmark, BenchmarkQuestion, QuestionScore, register
from vlm_unlearn.benchmarks.official_files import (
    SHORT,
    annotated_questions,
    annotator_answers,
    entries,
    most_common_answer,
    record,
    require_answers,
    texts,
)
from vlm_unlearn.benchmarks.vqa_text import leave_one_out, normalize_evalai, server_submission
from vlm_unlearn.errors import UserError, quoted
from vlm_unlearn.store import read_json


@register(
    "textvqa",
    "TextVQA_0.5.1_val.json of textvqa.org",
    "the download's train_images/ (test_images/ for the test split): <image_id>.jpg",
    "TextVQA_Rosetta_OCR_v0.2_val.json, to ask with the words found in the image, as LLaVA-1.5's published score",
)
class TextVQA(Benchmark):
    """Accuracy against ten annotators, EvalAI's normalisation on all texts."""

    def read_questions(
        self, annotations: Path, questions: Path | None, limit: int | None = None
    ) -> list[BenchmarkQuestion]:
        words = None if questions is None else _words(questions)
        found = []
        for value in _data(annotations, "image_id", "question")[:limit]:
            entry = record(annotations, "question", value["question_id"], value)
            image, text = entry.name("image_id"), entry.text("question").strip()
            asked = text[0].upper() + text[1:]  # as LLaVA asks; the file has small letters
            if words is not None and image in words:
                asked += f"\nReference OCR token: {', '.join(words[image])}"
            answer = most_common_answer(annotator_answers(value, entry.where)) if "answers" in value else None
            found.append(
                BenchmarkQuestion(str(value["question_id"]), f"{asked}\n{SHORT}", f"{image}.jpg", image, answer)
            )
        return found

    def read_truths(self, annotations: Path, questions: Path | None) -> Mapping[str, Any]:
        require_answers(_data(annotations), annotations, "answers")
        return annotated_questions(read_json(annotations), annotations, "data")

    def score_answer(self, id: str, truth: Any, text: str, official: bool) -> QuestionScore:
        return QuestionScore(
            id,
            leave_one_out(normalize_evalai(text), [normalize_evalai(answer) for answer in truth["answers"]]),
            truth["image"],
        )

    def submission(self, answers: Mapping[str, str | None]) -> object | None:
        return server_submission(answers, "question_id")


def _data(file: Path, *keys: str) -> list[Mapping[str, Any]]:
    value = read_json(file)
    if not isinstance(value, dict) or "data" not in value:
        raise UserError(f'{file}: expected {{"data": [...]}}, an official file of TextVQA')
    return list(entries(value["data"], str(file), "question_id", *keys))


def _words(file: Path) -> dict[str, list[str]]:
    """Image -> the words that Rosetta found in it."""
    value = read_json(file)
    if not isinstance(value, dict) or "data" not in value:
        raise UserError(f'{file}: expected {{"data": [...]}}, TextVQA\'s Rosetta OCR file')
    listed = entries(value["data"], str(file), "image_id", "ocr_tokens")
    return {
        str(entry["image_id"]): texts(entry["ocr_tokens"], f"{file}: image {quoted(entry['image_id'])}", "ocr_tokens")
        for entry in listed
    }
