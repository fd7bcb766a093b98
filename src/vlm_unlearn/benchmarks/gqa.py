"""GQA (Hudson and Manning 2019, arXiv 1902.09506)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_unlearn.benchmarks.base import Benchmark, BenchmarkQuestion, QuestionScore, register
from vlm_unlearn.benchmarks.official_files import SHORT, question_objects, record, require_answers, short_answer_score
from vlm_unlearn.store import read_json


@register("gqa", "testdev_balanced_questions.json of the GQA download", "the download's images/: <imageId>.jpg")
class GQA(Benchmark):
    """Exact match, without a closing full stop and without case."""

    def read_questions(
        self, annotations: Path, questions: Path | None, limit: int | None = None
    ) -> list[BenchmarkQuestion]:
        benchmark_questions = []
        for id, value in list(_read_entries(annotations).items())[:limit]:
            entry = record(annotations, id, value)
            image = entry.name("imageId")
            answer = entry.optional_text("answer")
            text = f"{entry.text('question')}\n{SHORT}"
            category = _structural_type(entry.value) or None
            benchmark_questions.append(BenchmarkQuestion(id, text, f"{image}.jpg", image, answer, category))
        return benchmark_questions

    def read_truths(self, annotations: Path, questions: Path | None) -> Mapping[str, Any]:
        entries = _read_entries(annotations)
        require_answers(list(entries.values()), annotations, "answer")
        for id, value in entries.items():
            if not isinstance(value.get("answer"), str):
                raise record(annotations, id, value).error("must be text", "invalid-field", "answer")
        return entries

    def score_answer(self, id: str, truth: Any, text: str, official: bool) -> QuestionScore:
        structural_type = _structural_type(truth)
        subsets = (structural_type,) if structural_type else ()

        def score(answer: str) -> QuestionScore:
            normalized = (answer if official else answer.strip()).rstrip(".").lower()
            is_right = normalized == str(truth["answer"]).lower()
            return QuestionScore(id, float(is_right), str(truth.get("imageId", id)), subsets)

        return short_answer_score(text, official, score)


def _read_entries(annotations: Path) -> dict[str, Any]:
    entries = question_objects(read_json(annotations), annotations)
    for id, value in entries.items():
        record(annotations, id, value)  # raises if the value is not an object
    return entries


def _structural_type(entry: Mapping[str, Any]) -> str:
    types = entry.get("types")
    return str(types.get("structural") or "") if isinstance(types, dict) else ""
