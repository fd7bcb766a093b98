"""MM-Vet (Yu et al. 2023, arXiv 2308.02490): open answers that a language model scores."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_unlearn.benchmarks.base import Benchmark, BenchmarkQuestion, Prediction, QuestionScore, register
from vlm_unlearn.benchmarks.official_files import question_objects, record, text_list
from vlm_unlearn.errors import UserError, quoted
from vlm_unlearn.metrics.answer_reading import final_answer
from vlm_unlearn.store import read_json


@register(
    "mmvet", "mm-vet.json of the MM-Vet repository's mm-vet.zip", "the zip's images/, under the names in the file"
)
class MMVet(Benchmark):
    """The mean of a judge's scores, 0 to 1. The subsets are the capabilities that a question needs, usually several.

    A question's id is its key, such as ``v1_0``. In the reference, ``<AND>`` joins the parts that an answer must all
    contain, and ``<OR>`` joins alternatives.
    """

    needs_judge = True
    rubric = "mm_vet"

    def read_questions(
        self, annotations: Path, questions: Path | None, limit: int | None = None
    ) -> list[BenchmarkQuestion]:
        benchmark_questions = []
        for id, entry in list(self.read_truths(annotations, None).items())[:limit]:
            image, category = entry["imagename"], "+".join(entry["capability"]) or None
            benchmark_questions.append(
                BenchmarkQuestion(id, entry["question"], image, image, entry["answer"], category)
            )
        return benchmark_questions

    def read_truths(self, annotations: Path, questions: Path | None) -> Mapping[str, Any]:
        truths = {}
        for id, value in question_objects(read_json(annotations), annotations).items():
            entry = record(annotations, id, value)
            capabilities = text_list(entry, "capability")
            truths[id] = {
                **{name: entry.text(name) for name in ("imagename", "question", "answer")},
                "capability": capabilities,
            }
        return truths

    def score_answer(self, id: str, truth: Any, text: str, official: bool) -> QuestionScore:
        raise UserError(
            "mmvet: a language model scores the answers. Pass its verdicts as --predictions.", code="no-verdicts"
        )

    def score_prediction(self, id: str, truth: Any, prediction: Prediction, official: bool) -> QuestionScore | None:
        score = prediction.score
        if score is None:
            return None
        if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 1:
            raise UserError(
                f"mmvet: the score must be a number from 0 to 1, found {quoted(score)}",
                code="invalid-field",
                record=quoted(id),
                field="score",
            )
        return QuestionScore(id, float(score), truth["imagename"], tuple(truth["capability"]))

    def submission(self, answers: Mapping[str, str | None]) -> object | None:
        return {id: final_answer(text or "") or "" for id, text in answers.items()}
