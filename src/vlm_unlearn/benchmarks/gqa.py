"""GQA (Hudson and Manning 2019, arXiv 1902.09506)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_unlearn.benchmarks.base import Benchmark, BenchmarkQuestion, QuestionScore, register
from vlm_unlearn.benchmarks.official_files import SHORT, record, require_answers
from vlm_unlearn.errors import UserError, quoted
from vlm_unlearn.store import read_json


@register("gqa", "testdev_balanced_questions.json of the GQA download", "the download's images/: <imageId>.jpg")
class GQA(Benchmark):
    """Exact match once a closing full stop is off and case is folded."""

    def read_questions(
        self, annotations: Path, questions: Path | None, limit: int | None = None
    ) -> list[BenchmarkQuestion]:
        found = []
        for id, value in list(_entries(annotations).items())[:limit]:
            entry = record(annotations, "question", id, value)
            image = entry.name("imageId")
            answer = entry.optional_text("answer")
            found.append(
                BenchmarkQuestion(
                    id, f"{entry.text('question')}\n{SHORT}", f"{image}.jpg", image, answer, _kind(entry.value) or None
                )
            )
        return found

    def read_truths(self, annotations: Path, questions: Path | None) -> Mapping[str, Any]:
        value = _entries(annotations)
        require_answers(list(value.values()), annotations, "answer")
        for id, entry in value.items():
            if not isinstance(entry.get("answer"), str):
                raise UserError(f'{annotations}: question {quoted(id)} has no "answer"')
        return value

    def score_answer(self, id: str, truth: Any, text: str, official: bool) -> QuestionScore:
        said = text if official else text.strip()
        right = said.rstrip(".").lower() == str(truth["answer"]).lower()
        kind = _kind(truth)
        return QuestionScore(id, float(right), str(truth.get("imageId", id)), (kind,) if kind else ())


def _entries(annotations: Path) -> dict[str, Any]:
    value = read_json(annotations)
    if not isinstance(value, dict) or not value:
        raise UserError(f"{annotations}: expected an object, question id -> question")
    for id, entry in value.items():
        if not isinstance(entry, dict):
            raise UserError(f"{annotations}: question {quoted(id)} is not an object")
    return value


def _kind(entry: Mapping[str, Any]) -> str:
    kinds = entry.get("types")
    return str(kinds.get("structural") or "") if isinstance(kinds, dict) else ""
