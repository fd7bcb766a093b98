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
    entries_by_id,
    most_common_answer,
    record,
    require_answers,
    short_answer_score,
    text_list,
)
from vlm_unlearn.benchmarks.vqa_text import leave_one_out, normalize_evalai, server_submission
from vlm_unlearn.errors import UserError
from vlm_unlearn.store import read_json


@register(
    "textvqa",
    "TextVQA_0.5.1_val.json of textvqa.org",
    "the download's train_images/ (test_images/ for the test split): <image_id>.jpg",
    "TextVQA_Rosetta_OCR_v0.2_val.json, which adds the words in the image to the question, as for LLaVA-1.5's score",
)
class TextVQA(Benchmark):
    """Accuracy against ten annotators, with EvalAI's normalization of all texts."""

    def read_questions(
        self, annotations: Path, questions: Path | None, limit: int | None = None
    ) -> list[BenchmarkQuestion]:
        words_by_image = None if questions is None else _read_ocr_words(questions)
        benchmark_questions = []
        for value in _read_data(annotations, "official annotation file", "question_id", "image_id", "question")[:limit]:
            entry = record(annotations, value["question_id"], value)
            image, text = entry.name("image_id"), entry.text("question").strip()
            text = text[0].upper() + text[1:]  # as LLaVA's evaluation does; the file has small letters
            if words_by_image is not None and image in words_by_image:
                text += f"\nReference OCR token: {', '.join(words_by_image[image])}"
            answer = most_common_answer(annotator_answers(entry)) if "answers" in value else None
            benchmark_questions.append(
                BenchmarkQuestion(str(value["question_id"]), f"{text}\n{SHORT}", f"{image}.jpg", image, answer)
            )
        return benchmark_questions

    def read_truths(self, annotations: Path, questions: Path | None) -> Mapping[str, Any]:
        data = _read_data(annotations, "official annotation file", "question_id")
        require_answers(data, annotations, "answers")
        return annotated_questions({"data": data}, annotations, "data")

    def score_answer(self, id: str, truth: Any, text: str, official: bool) -> QuestionScore:
        answers = [normalize_evalai(answer) for answer in truth["answers"]]
        return short_answer_score(
            text,
            official,
            lambda answer: QuestionScore(id, leave_one_out(normalize_evalai(answer), answers), truth["image"]),
        )

    def submission(self, answers: Mapping[str, str | None]) -> object | None:
        return server_submission(answers, "question_id")


def _read_data(file: Path, description: str, *keys: str) -> list[Mapping[str, Any]]:
    """Reads the list under ``data``, whose objects must all have certain keys."""
    value = read_json(file)
    if not isinstance(value, dict) or "data" not in value:
        raise UserError(f'expected {{"data": [...]}}. Pass TextVQA\'s {description}.', code="invalid-field", file=file)
    return entries(value["data"], file, *keys)


def _read_ocr_words(file: Path) -> dict[str, list[str]]:
    """Reads the words that the OCR system Rosetta recognized in each image."""
    data = _read_data(file, "Rosetta OCR file", "image_id", "ocr_tokens")
    by_image = entries_by_id(data, file, "image_id")
    return {image: text_list(record(file, image, value), "ocr_tokens") for image, value in by_image.items()}
