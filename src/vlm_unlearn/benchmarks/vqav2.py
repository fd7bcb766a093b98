"""VQAv2 (Goyal et al. 2017, arXiv 1612.00837)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_unlearn.benchmarks.base import Benchmark, BenchmarkQuestion, QuestionScore, register
from vlm_unlearn.benchmarks.official_files import (
    SHORT,
    annotated_questions,
    answers_not_public,
    entries,
    most_common_answer,
    record,
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


@register(
    "vqav2",
    "v2_mscoco_val2014_annotations.json of visualqa.org; a test split has its questions file only",
    "COCO's val2014/ (test2015/ for a test split): COCO_val2014_<image_id, 12 digits>.jpg",
    "v2_OpenEnded_mscoco_val2014_questions.json, to ask a model",
)
class VQAv2(Benchmark):
    """Accuracy against ten annotators. The official code normalises texts only where the annotators disagree; by default always."""

    def read_questions(
        self, annotations: Path, questions: Path | None, limit: int | None = None
    ) -> list[BenchmarkQuestion]:
        first = read_json(annotations)
        if _is_questions(first):
            return list(_asked(first, annotations).values())[:limit]
        truths = annotated_questions(first, annotations, "annotations")
        if questions is None:
            raise UserError(
                f"{annotations}: has answers but no questions; pass --questions v2_OpenEnded_mscoco_val2014_questions.json"
            )
        asked = _asked(read_json(questions), questions)
        found = []
        for id, truth in list(truths.items())[:limit]:
            if id not in asked:
                raise UserError(
                    f"{questions}: question {quoted(id)} of {annotations} is not there; the two must be of one split"
                )
            one = asked[id]
            found.append(
                BenchmarkQuestion(
                    id, one.text, one.image, one.cluster, most_common_answer(truth["answers"]), truth["type"] or None
                )
            )
        return found

    def read_truths(self, annotations: Path, questions: Path | None) -> Mapping[str, Any]:
        value = read_json(annotations)
        if _is_questions(value):
            raise answers_not_public(annotations)
        return annotated_questions(value, annotations, "annotations")

    def score_answer(self, id: str, truth: Any, text: str, official: bool) -> QuestionScore:
        return QuestionScore(
            id, accuracy(text, truth["answers"], official), truth["image"], (truth["type"],) if truth["type"] else ()
        )

    def submission(self, answers: Mapping[str, str | None]) -> object | None:
        return server_submission(answers, "question_id")


def _is_questions(value: Any) -> bool:
    return isinstance(value, dict) and "questions" in value and "annotations" not in value


def _asked(value: Any, file: Path) -> dict[str, BenchmarkQuestion]:
    """Question id -> question, from an official questions file; COCO has one folder of images for all test splits."""
    if not _is_questions(value):
        raise UserError(f'{file}: expected {{"questions": [...]}}, VQAv2\'s questions file')
    split = str(value.get("data_subtype") or "val2014")
    folder = "test2015" if split.startswith("test") else split
    found = {}
    for item in entries(value["questions"], str(file), "question_id", "image_id", "question"):
        id = str(item["question_id"])
        entry = record(file, "question", id, item)
        image = entry.name("image_id")
        found[id] = BenchmarkQuestion(
            id, f"{entry.text('question')}\n{SHORT}", f"COCO_{folder}_{image:0>12}.jpg", image
        )
    return found


def accuracy(prediction: str, answers: list[str], official: bool) -> float:
    """VQAv2's accuracy of one answer, 0 to 1."""
    prediction, answers = one_line(prediction), [one_line(answer) for answer in answers]
    if len(set(answers)) > 1 or not official:
        prediction, *answers = (normalize_words(strip_punctuation(text)) for text in (prediction, *answers))
    return leave_one_out(prediction, answers)
