"""POPE (Li et al. 2023, arXiv 2305.10355): yes-or-no questions about objects that may not be in the image."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_unlearn.benchmarks.base import Benchmark, BenchmarkQuestion, QuestionScore, RatioTerm, register
from vlm_unlearn.benchmarks.official_files import SHORT, record
from vlm_unlearn.data.json_stream import stream
from vlm_unlearn.errors import UserError, quoted
from vlm_unlearn.metrics.answer_reading import read_yes_no

_QUESTION = re.compile(
    r"\s*(?:is|are) there (?:an?|any|some)\s+([\w -]+?) (?:in|on) the (?:image|picture|photo)", re.IGNORECASE
)


@register(
    "pope",
    "coco_pope_random.json, coco_pope_popular.json and coco_pope_adversarial.json of the POPE repository, "
    "together or one of them",
    "COCO's val2014/, under the names in the file",
)
class POPE(Benchmark):
    """F1 of the answer "yes", averaged over the files if there are several.

    Accuracy, precision, recall and the share of "yes" are reported too.
    """

    multiple_files = True
    headline_name = "F1"

    def read_questions(
        self, annotations: Path, questions: Path | None, limit: int | None = None
    ) -> list[BenchmarkQuestion]:
        benchmark_questions = []
        for id, value in list(self.read_truths(annotations, questions).items())[:limit]:
            entry = record(annotations, id, value)
            image, text = entry.text("image"), f"{entry.text('text')}\n{SHORT}"
            benchmark_questions.append(BenchmarkQuestion(id, text, image, image, value["label"], annotations.stem))
        return benchmark_questions

    def read_truths(self, annotations: Path, questions: Path | None) -> Mapping[str, Any]:
        truths: dict[str, Any] = {}
        for item in stream(annotations):
            if item.error is not None:
                raise UserError(
                    "the line is not JSON. POPE's files have one question per line.",
                    code="invalid-json",
                    file=annotations,
                    record=item.number + 1,
                )
            entry = item.value
            if not isinstance(entry, dict) or "question_id" not in entry or entry.get("label") not in ("yes", "no"):
                raise UserError(
                    'the line must have a "question_id" and a "label" that is yes or no',
                    code="invalid-field",
                    file=annotations,
                    record=item.number + 1,
                )
            id = str(entry["question_id"])
            if id in truths:
                raise UserError(
                    f"the file already has a question {quoted(id)}. Pass POPE's files separately.",
                    code="duplicate-id",
                    file=annotations,
                    record=item.number + 1,
                )
            truths[id] = {**entry, "file": annotations.stem}
        if not truths:
            raise UserError("the file has no questions", code="no-records", file=annotations)
        return truths

    def score_answer(self, id: str, truth: Any, text: str, official: bool) -> QuestionScore:
        answer = _answer(truth, text, official)
        cluster = str(truth.get("image", id))
        return QuestionScore(id, float(answer == truth["label"]), cluster, (truth["label"],), unparsed=answer is None)

    def extra_metrics(self, answers: Sequence[tuple[Any, str]], official: bool) -> dict[str, float]:
        pairs_by_file: dict[str, list[tuple[str, str | None]]] = {}
        for truth, text in answers:
            pair = (truth["label"], _answer(truth, text, official))
            pairs_by_file.setdefault(truth.get("file", ""), []).append(pair)
        metrics_by_file = {file: _yes_metrics(pairs) for file, pairs in pairs_by_file.items()} or {"": _yes_metrics([])}
        means = {
            name: sum(metrics[name] for metrics in metrics_by_file.values()) / len(metrics_by_file)
            for name in _yes_metrics([])
        }
        if len(metrics_by_file) == 1:
            return means
        return means | {f"f1 of {file}": metrics["f1"] for file, metrics in metrics_by_file.items()}

    def ratio_terms(
        self, truths: Mapping[str, Any], answers: Sequence[tuple[Any, str]], official: bool
    ) -> dict[str, list[RatioTerm]]:
        """Returns the terms of F1 by file. F1 is the ratio of sums 2 TP / (answers "yes" + labels "yes")."""
        terms: dict[str, list[RatioTerm]] = {truth.get("file", ""): [] for truth in truths.values()}
        for truth, text in answers:
            label, answer = truth["label"], _answer(truth, text, official)
            numerator = 2.0 * (answer == "yes" == label)
            denominator = float((answer == "yes") + (label == "yes"))
            terms[truth.get("file", "")].append(RatioTerm(str(truth.get("image", "")), numerator, denominator))
        return terms


def _yes_metrics(pairs: Sequence[tuple[str, str | None]]) -> dict[str, float]:
    """Returns precision, recall and F1 of "yes", and the share of "yes".

    Args:
        pairs: ``(label, answer)`` pairs of one file.
    """
    true_positives = sum(answer == "yes" == label for label, answer in pairs)
    predicted_yes = sum(answer == "yes" for _, answer in pairs)
    labeled_yes = sum(label == "yes" for label, _ in pairs)
    precision = true_positives / predicted_yes if predicted_yes else 0.0
    recall = true_positives / labeled_yes if labeled_yes else 0.0
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    yes_ratio = predicted_yes / len(pairs) if pairs else 0.0
    return {"precision": precision, "recall": recall, "f1": f1, "yes_ratio": yes_ratio}


def parse_yes_no(text: str, official: bool, question: str = "") -> str | None:
    """Returns ``"yes"`` or ``"no"``, or None for an answer that is neither.

    Args:
        text: The answer.
        official: Read every answer whose first sentence has no "no" or "not" as yes, as the official code does. Never
            returns None then. By default the answer is read by `read_yes_no`.
        question: The question, which names the object that a statement must be about to mean yes.
    """
    if official:
        return "no" if {"No", "not", "no"} & set(text.split(".")[0].replace(",", "").split(" ")) else "yes"
    match = _QUESTION.match(question)
    return read_yes_no(text, match.group(1) if match else None)


def _answer(truth: Mapping[str, Any], text: str, official: bool) -> str | None:
    question = truth.get("text")
    return parse_yes_no(text, official, question if isinstance(question, str) else "")
