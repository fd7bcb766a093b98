"""VizWiz VQA (Gurari et al. 2018, arXiv 1802.08218)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_unlearn.benchmarks.base import Benchmark, BenchmarkQuestion, QuestionScore, register
from vlm_unlearn.benchmarks.official_files import (
    SHORT,
    annotator_answers,
    entries,
    most_common_answer,
    record,
    require_answers,
)
from vlm_unlearn.benchmarks.vqa_text import leave_one_out, normalize_evalai, server_submission
from vlm_unlearn.errors import quoted
from vlm_unlearn.store import read_json

UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."


@register(
    "vizwiz",
    "val.json of vizwiz.org; test.json has no answers",
    "the download's val/ (or test/), under the names in the file",
)
class VizWiz(Benchmark):
    """Accuracy against ten annotators as lmms-eval counts it; a question's id is its image's name."""

    def read_questions(
        self, annotations: Path, questions: Path | None, limit: int | None = None
    ) -> list[BenchmarkQuestion]:
        found = []
        for value in entries(read_json(annotations), str(annotations), "image", "question")[:limit]:
            entry = record(annotations, "question", value["image"], value)
            image, text = entry.text("image"), entry.text("question")
            answer = most_common_answer(annotator_answers(value, entry.where)) if "answers" in value else None
            category = entry.optional_text("answer_type")
            found.append(BenchmarkQuestion(image, f"{text}\n{UNANSWERABLE}\n{SHORT}", image, image, answer, category))
        return found

    def read_truths(self, annotations: Path, questions: Path | None) -> Mapping[str, Any]:
        listed = entries(read_json(annotations), str(annotations), "image")
        require_answers(listed, annotations, "answers")
        return {
            str(entry["image"]): {
                "answers": annotator_answers(entry, f"{annotations}: question {quoted(entry['image'])}"),
                "type": str(entry.get("answer_type", "")),
            }
            for entry in entries(listed, str(annotations), "answers")
        }

    def score_answer(self, id: str, truth: Any, text: str, official: bool) -> QuestionScore:
        value = leave_one_out(normalize_evalai(text), [normalize_evalai(answer) for answer in truth["answers"]])
        return QuestionScore(id, value, id, (truth["type"],) if truth["type"] else ())

    def submission(self, answers: Mapping[str, str | None]) -> object | None:
        return server_submission(answers, "image")
