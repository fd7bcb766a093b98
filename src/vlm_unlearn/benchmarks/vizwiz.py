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
    entries_by_id,
    most_common_answer,
    record,
    require_answers,
    short_answer_score,
)
from vlm_unlearn.benchmarks.vqa_text import leave_one_out, normalize_evalai, server_submission
from vlm_unlearn.store import read_json

UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."


@register(
    "vizwiz",
    "val.json of vizwiz.org; test.json has no answers",
    "the download's val/ (or test/), under the names in the file",
)
class VizWiz(Benchmark):
    """Accuracy against ten annotators, counted as in lmms-eval. A question's id is the name of its image."""

    def read_questions(
        self, annotations: Path, questions: Path | None, limit: int | None = None
    ) -> list[BenchmarkQuestion]:
        benchmark_questions = []
        values = entries(read_json(annotations), annotations, "image", "question")
        for id, value in list(entries_by_id(values, annotations, "image").items())[:limit]:
            entry = record(annotations, id, value)
            image, text = entry.text("image"), f"{entry.text('question')}\n{UNANSWERABLE}\n{SHORT}"
            answer = most_common_answer(annotator_answers(entry)) if "answers" in value else None
            category = entry.optional_text("answer_type")
            benchmark_questions.append(BenchmarkQuestion(image, text, image, image, answer, category))
        return benchmark_questions

    def read_truths(self, annotations: Path, questions: Path | None) -> Mapping[str, Any]:
        values = entries(read_json(annotations), annotations, "image")
        require_answers(values, annotations, "answers")
        return {
            id: {
                "answers": annotator_answers(record(annotations, id, value)),
                "type": str(value.get("answer_type", "")),
                "question": value.get("question"),
            }
            for id, value in entries_by_id(entries(values, annotations, "answers"), annotations, "image").items()
        }

    def score_answer(self, id: str, truth: Any, text: str, official: bool) -> QuestionScore:
        answers = [normalize_evalai(answer) for answer in truth["answers"]]
        subsets = (truth["type"],) if truth["type"] else ()
        return short_answer_score(
            text,
            official,
            lambda answer: QuestionScore(id, leave_one_out(normalize_evalai(answer), answers), id, subsets),
        )

    def submission(self, answers: Mapping[str, str | None]) -> object | None:
        return server_submission(answers, "image")
