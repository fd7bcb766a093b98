"""LLaVA-Bench in the wild (Liu et al. 2023, arXiv 2304.08485): open answers, scored relative to those of GPT-4."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_unlearn.benchmarks.base import Benchmark, BenchmarkQuestion, Prediction, QuestionScore, RatioTerm, register
from vlm_unlearn.data.formats.fields import RawRecord, read_objects
from vlm_unlearn.errors import UserError, quoted

MAX_SCORE = 10


@register(
    "llava_bench",
    "questions.jsonl of the llava-bench-in-the-wild download, with context.jsonl next to it",
    "the download's images/, under the names in the file",
    "answers_gpt4.jsonl, the reference answers; needed to run a model",
)
class LLaVABench(Benchmark):
    """The relative score: the sum of a judge's scores of the answers, divided by that of its scores of the references.

    The judge scores both from 1 to 10. It gets the reference and a description of the picture, but not the picture. The
    subsets are the types of questions: conv, detail and complex. `official` reads a review that LLaVA's script could
    not parse, with the scores -1 and -1, as LLaVA's summary does. By default, it counts as missing.
    """

    needs_judge = True
    rubric = "llava_bench"
    headline_name = "relative score"
    mean_name = "mean score of the answers"

    def read_questions(
        self, annotations: Path, questions: Path | None, limit: int | None = None
    ) -> list[BenchmarkQuestion]:
        if questions is None:
            raise UserError(
                "llava_bench needs the reference answers. Pass answers_gpt4.jsonl as --questions.",
                code="missing-setting",
                field="questions",
            )
        references = {id: entry.text("text") for id, entry in _by_id(questions, "question_id").items()}
        captions = {id: _caption(entry) for id, entry in _by_id(annotations.parent / "context.jsonl", "image").items()}
        benchmark_questions = []
        for id, entry in list(_by_id(annotations, "question_id").items())[:limit]:
            image = entry.text("image")
            if id not in references:
                raise entry.error(f"{questions} has no answer to the question", "run-mismatch", "question_id")
            if image not in captions:
                raise entry.error("context.jsonl has no description of the picture", "run-mismatch", "image")
            reference = f"Description of the picture:\n{captions[image]}\n\nReference answer:\n{references[id]}"
            category = entry.text("category")
            benchmark_questions.append(BenchmarkQuestion(id, entry.text("text"), image, image, reference, category))
        return benchmark_questions

    def read_truths(self, annotations: Path, questions: Path | None) -> Mapping[str, Any]:
        return {
            id: {"question": entry.text("text"), "image": entry.text("image"), "category": entry.text("category")}
            for id, entry in _by_id(annotations, "question_id").items()
        }

    def is_judged(self, prediction: Prediction) -> bool:
        return prediction.numbers is not None or prediction.score is not None

    def score_answer(self, id: str, truth: Any, text: str, official: bool) -> QuestionScore:
        raise UserError(
            "llava_bench: a language model scores the answers. Pass its verdicts or LLaVA's reviews as --predictions.",
            code="no-verdicts",
        )

    def score_prediction(self, id: str, truth: Any, prediction: Prediction, official: bool) -> QuestionScore | None:
        pair = _judged_pair(id, prediction)
        if pair is None or (-1 in pair and not official):
            return None
        value = min(1.0, max(0.0, pair[1] / MAX_SCORE))
        return QuestionScore(id, value, truth["image"], (truth["category"],), judged_pair=pair)

    def judged_metrics(self, scores: Sequence[QuestionScore], official: bool) -> dict[str, float]:
        """Returns the relative score of each type of question, and the mean scores of references and answers."""
        metrics = {}
        pairs = [score.judged_pair for score in scores if score.judged_pair is not None]
        for name in dict.fromkeys(subset for score in scores for subset in score.subsets):
            metrics[f"{name} relative"] = _relative(
                [score.judged_pair for score in scores if score.judged_pair is not None and name in score.subsets]
            )
        if pairs:
            metrics["relative"] = _relative(pairs)
            metrics["reference score"] = sum(reference for reference, _ in pairs) / len(pairs) / MAX_SCORE
            metrics["answer score"] = sum(answer for _, answer in pairs) / len(pairs) / MAX_SCORE
        return metrics

    def judged_terms(self, scores: Sequence[QuestionScore]) -> dict[str, list[RatioTerm]]:
        terms = [
            RatioTerm(score.cluster, score.judged_pair[1], score.judged_pair[0])
            for score in scores
            if score.judged_pair is not None
        ]
        return {"": terms}


def _relative(pairs: Sequence[tuple[float, float]]) -> float:
    references = sum(reference for reference, _ in pairs)
    return sum(answer for _, answer in pairs) / references if references else 0.0


def _judged_pair(id: str, prediction: Prediction) -> tuple[float, float] | None:
    """Returns the scores of the reference and the answer: a verdict's numbers, or the ``tuple`` of LLaVA's reviews.

    A score alone, from 0 to 1, is relative to a reference with the highest score.
    """
    numbers, score = prediction.numbers, prediction.score
    if numbers is None and score is None:
        return None
    if numbers is None:
        numbers = [MAX_SCORE, score * MAX_SCORE if _is_score(score) and 0 <= score <= 1 else None]
    pair = [numbers.get("reference"), numbers.get("answer")] if isinstance(numbers, dict) else numbers
    if not isinstance(pair, list) or len(pair) != 2 or not all(map(_is_score, pair)):
        raise UserError(
            f"llava_bench: needs the judge's scores of the reference and of the answer, from 1 to {MAX_SCORE}, or one "
            f"score from 0 to 1, found {quoted(score if prediction.numbers is None else numbers)}",
            code="invalid-field",
            record=quoted(id),
            field="score" if prediction.numbers is None else "numbers" if isinstance(numbers, dict) else "tuple",
        )
    return float(pair[0]), float(pair[1])


def _is_score(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and (0 <= value <= MAX_SCORE or value == -1)


def _by_id(file: Path, key: str) -> dict[str, RawRecord]:
    """Returns the records of a JSON-lines file by the id under a key."""
    by_id: dict[str, RawRecord] = {}
    for entry in _records(file, key):
        id = entry.name(key)
        if id in by_id:
            raise entry.error(f"an earlier record has the same {key}", "duplicate-id", key)
        by_id[id] = entry
    if not by_id:
        raise UserError("the file has no records", code="no-records", file=file)
    return by_id


def _records(file: Path, key: str) -> Iterator[RawRecord]:
    for entry in read_objects(file, key):
        entry.file = file  # errors give the path, as those of other benchmarks
        yield entry


def _caption(entry: RawRecord) -> str:
    caption = entry.value.get("caption")
    if isinstance(caption, list) and all(isinstance(line, str) for line in caption):
        return "\n".join(caption)
    return entry.text("caption")
