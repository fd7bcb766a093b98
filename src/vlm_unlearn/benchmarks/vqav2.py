"""VQAv2 (Goyal et al. 2017, arXiv 1612.00837)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlm_unlearn.benchmarks.base import Benchmark, BenchmarkQuestion, QuestionScore, register
from vlm_unlearn.benchmarks.official_files import (
    SHORT,
    annotated_questions,
    answers_not_public,
    entries,
    entries_by_id,
    most_common_answer,
    record,
    short_answer_score,
)
from vlm_unlearn.benchmarks.vqa_text import (
    leave_one_out,
    normalize_words,
    one_line,
    server_submission,
    strip_punctuation,
)
from vlm_unlearn.errors import UserError, quoted
from vlm_unlearn.store import read_json

QUESTION_FILE = "v2_OpenEnded_mscoco_val2014_questions.json"


@register(
    "vqav2",
    "v2_mscoco_val2014_annotations.json of visualqa.org; a test split has its questions file only",
    "COCO's val2014/ (test2015/ for a test split): COCO_val2014_<image_id, 12 digits>.jpg",
    f"{QUESTION_FILE}, to ask a model",
)
class VQAv2(Benchmark):
    """Accuracy against ten annotators.

    The official code normalizes texts only if the annotators disagree. By default, texts are always normalized.
    """

    def read_questions(
        self, annotations: Path, questions: Path | None, limit: int | None = None
    ) -> list[BenchmarkQuestion]:
        value = read_json(annotations)
        if _is_question_file(value):
            return list(_parse_questions(value, annotations).values())[:limit]
        truths = annotated_questions(value, annotations, "annotations")
        if questions is None:
            raise UserError(
                f"the file has answers but no questions. Pass --questions {QUESTION_FILE}.",
                code="missing-setting",
                file=annotations,
            )
        questions_by_id = _parse_questions(read_json(questions), questions)
        benchmark_questions = []
        for id, truth in list(truths.items())[:limit]:
            if id not in questions_by_id:
                raise UserError(
                    f"the question {quoted(id)} of {annotations} is missing. Pass two files of the same split.",
                    code="run-mismatch",
                    file=questions,
                )
            reference, category = most_common_answer(truth["answers"]), truth["type"] or None
            benchmark_questions.append(replace(questions_by_id[id], reference=reference, category=category))
        return benchmark_questions

    def read_truths(self, annotations: Path, questions: Path | None) -> Mapping[str, Any]:
        value = read_json(annotations)
        if _is_question_file(value):
            raise answers_not_public(annotations)
        return annotated_questions(value, annotations, "annotations")

    def score_answer(self, id: str, truth: Any, text: str, official: bool) -> QuestionScore:
        subsets = (truth["type"],) if truth["type"] else ()
        return short_answer_score(
            text,
            official,
            lambda answer: QuestionScore(id, accuracy(answer, truth["answers"], official), truth["image"], subsets),
        )

    def submission(self, answers: Mapping[str, str | None]) -> object | None:
        return server_submission(answers, "question_id")


def _is_question_file(value: Any) -> bool:
    return isinstance(value, dict) and "questions" in value and "annotations" not in value


def _parse_questions(value: Any, file: Path) -> dict[str, BenchmarkQuestion]:
    """Parses an official questions file. Returns the questions by id."""
    if not _is_question_file(value):
        raise UserError('expected {"questions": [...]}. Pass VQAv2\'s questions file.', code="invalid-field", file=file)
    split = str(value.get("data_subtype") or "val2014")
    folder = "test2015" if split.startswith("test") else split  # COCO has one image folder for all test splits
    questions = {}
    items = entries(value["questions"], file, "question_id", "image_id", "question")
    for id, item in entries_by_id(items, file, "question_id").items():
        entry = record(file, id, item)
        image = entry.name("image_id")
        text = f"{entry.text('question')}\n{SHORT}"
        questions[id] = BenchmarkQuestion(id, text, f"COCO_{folder}_{image:0>12}.jpg", image)
    return questions


def accuracy(prediction: str, answers: list[str], official: bool) -> float:
    """Returns VQAv2's accuracy of one answer, from 0 to 1.

    Args:
        prediction: The answer.
        answers: The annotators' answers.
        official: Normalize texts only if the annotators disagree, as the official code does.
    """
    prediction, answers = one_line(prediction), [one_line(answer) for answer in answers]
    if len(set(answers)) > 1 or not official:
        prediction, *answers = (normalize_words(strip_punctuation(text)) for text in (prediction, *answers))
    return leave_one_out(prediction, answers)
