"""MM-Vet (Yu et al. 2023, arXiv 2308.02490): open answers that a language model scores."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_unlearn.benchmarks.base import Benchmark, BenchmarkQuestion, Prediction, QuestionScore, register
from vlm_unlearn.benchmarks.official_files import record, texts
from vlm_unlearn.errors import UserError, quoted
from vlm_unlearn.store import read_json


@register(
    "mmvet", "mm-vet.json of the MM-Vet repository's mm-vet.zip", "the zip's images/, under the names in the file"
)
class MMVet(Benchmark):
    """The mean of a judge's scores, 0 to 1; its parts are the capabilities that questions need, of which most need several.

    A question's id is its key, ``v1_0``. In the reference ``<AND>`` joins what must all be said, ``<OR>`` what will do each.
    """

    needs_judge = True

    def read_questions(
        self, annotations: Path, questions: Path | None, limit: int | None = None
    ) -> list[BenchmarkQuestion]:
        found = []
        for id, entry in list(self.read_truths(annotations, None).items())[:limit]:
            image, text, category = entry["imagename"], entry["question"], "+".join(entry["capability"]) or None
            found.append(BenchmarkQuestion(id, text, image, image, entry["answer"], category))
        return found

    def read_truths(self, annotations: Path, questions: Path | None) -> Mapping[str, Any]:
        value = read_json(annotations)
        if not isinstance(value, dict) or not value:
            raise UserError(f"{annotations}: expected an object, question id -> question")
        found = {}
        for id, raw in value.items():
            entry = record(annotations, "question", id, raw)
            capability = texts(entry.value.get("capability"), entry.where, "capability")
            found[id] = {
                **{name: entry.text(name) for name in ("imagename", "question", "answer")},
                "capability": capability,
            }
        return found

    def score_answer(self, id: str, truth: Any, text: str, official: bool) -> QuestionScore:
        raise UserError("mmvet: a language model scores its answers; they can't be scored by themselves")

    def score_prediction(self, id: str, truth: Any, prediction: Prediction, official: bool) -> QuestionScore | None:
        score = prediction.score
        if score is None:
            return None
        if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 1:
            raise UserError(
                f'mmvet: question {quoted(id)}: "score" must be a number from 0 to 1, found {quoted(score)}'
            )
        return QuestionScore(id, float(score), truth["imagename"], tuple(truth["capability"]))

    def submission(self, answers: Mapping[str, str | None]) -> object | None:
        return {id: text or "" for id, text in answers.items()}
