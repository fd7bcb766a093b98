"""POPE (Li et al. 2023, arXiv 2305.10355): does the model see what is not there?"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_unlearn.benchmarks.base import Benchmark, BenchmarkQuestion, QuestionScore, RatioTerm, register
from vlm_unlearn.benchmarks.official_files import SHORT, record
from vlm_unlearn.data.json_stream import stream
from vlm_unlearn.errors import UserError, quoted
from vlm_unlearn.judging.keyword import corrected_refusal


@register(
    "pope",
    "coco_pope_random.json, coco_pope_popular.json and coco_pope_adversarial.json of the POPE repository, together or one of them",
    "COCO's val2014/, under the names in the file",
)
class POPE(Benchmark):
    """Yes or no. The headline is F1 of "yes", over several files their mean. Beside it accuracy, precision, recall, share of "yes"."""

    multiple_files = True

    def read_questions(
        self, annotations: Path, questions: Path | None, limit: int | None = None
    ) -> list[BenchmarkQuestion]:
        found = []
        for id, value in list(self.read_truths(annotations, questions).items())[:limit]:
            entry = record(annotations, "question", id, value)
            image = entry.text("image")
            found.append(
                BenchmarkQuestion(id, f"{entry.text('text')}\n{SHORT}", image, image, value["label"], annotations.stem)
            )
        return found

    def read_truths(self, annotations: Path, questions: Path | None) -> Mapping[str, Any]:
        found: dict[str, Any] = {}
        for item in stream(annotations):
            where = f"{annotations}: line {item.line}"
            if item.error is not None:
                raise UserError(f"{where} is not JSON; POPE's files have a question a line")
            entry = item.value
            if not isinstance(entry, dict) or "question_id" not in entry or entry.get("label") not in ("yes", "no"):
                raise UserError(f'{where} must have "question_id", and "label" yes or no')
            id = str(entry["question_id"])
            if id in found:
                raise UserError(f"{where}: question {quoted(id)} is there twice; give POPE's files one by one")
            found[id] = {**entry, "file": annotations.stem}
        if not found:
            raise UserError(f"{annotations}: holds no questions")
        return found

    def score_answer(self, id: str, truth: Any, text: str, official: bool) -> QuestionScore:
        said = parse_yes_no(text, official)
        return QuestionScore(
            id, float(said == truth["label"]), str(truth.get("image", id)), (truth["label"],), unparsed=said is None
        )

    def extra_metrics(self, graded: Sequence[tuple[Any, str]], official: bool) -> dict[str, float]:
        by_file: dict[str, list[tuple[str, str | None]]] = {}
        for truth, text in graded:
            by_file.setdefault(truth.get("file", ""), []).append((truth["label"], parse_yes_no(text, official)))
        counted = {file: _counts(pairs) for file, pairs in by_file.items()} or {"": _counts([])}
        means = {name: sum(counts[name] for counts in counted.values()) / len(counted) for name in _counts([])}
        if len(counted) == 1:
            return means
        return means | {f"f1 of {file}": counts["f1"] for file, counts in counted.items()}

    def ratio_terms(
        self, truths: Mapping[str, Any], graded: Sequence[tuple[Any, str]], official: bool
    ) -> dict[str, list[RatioTerm]]:
        """F1 is a ratio of sums, 2 TP / (answers "yes" + labels "yes")."""
        found: dict[str, list[RatioTerm]] = {truth.get("file", ""): [] for truth in truths.values()}
        for truth, text in graded:
            label, said = truth["label"], parse_yes_no(text, official)
            below = (said == "yes") + (label == "yes")
            found[truth.get("file", "")].append(
                RatioTerm(str(truth.get("image", "")), 2.0 * (said == "yes" == label), float(below))
            )
        return found


def _counts(pairs: Sequence[tuple[str, str | None]]) -> dict[str, float]:
    """Precision, recall and F1 of "yes", and its share, from ``(label, answer)`` pairs of one file."""
    true_yes = sum(said == "yes" == label for label, said in pairs)
    said_yes, are_yes = sum(said == "yes" for _, said in pairs), sum(label == "yes" for label, _ in pairs)
    precision = true_yes / said_yes if said_yes else 0.0
    recall = true_yes / are_yes if are_yes else 0.0
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return {"precision": precision, "recall": recall, "f1": f1, "yes_ratio": said_yes / len(pairs) if pairs else 0.0}


_UNSURE = re.compile(
    r"\b(?:don't|do not|can't|cannot|can not|couldn't|unable to) (?:know|tell|say|determine|answer|be sure)\b|\bnot sure\b"
)


def parse_yes_no(text: str, official: bool) -> str | None:
    """``yes`` or ``no``. The official reading takes whatever doesn't say no in its first sentence as yes; by default, what says neither
    is None and counts as wrong."""
    sentence = text.split(".")[0].replace(",", "")
    words = sentence.split(" ")
    if official:
        return "no" if {"No", "not", "no"} & set(words) else "yes"
    lowered = sentence.lower().replace("\u2019", "'")
    if corrected_refusal(text) or _UNSURE.search(lowered):
        return None  # "I'm sorry, I can't help" holds a negation and is no answer
    found = re.findall(r"[a-z']+", lowered)
    if any(word in ("no", "not", "nope", "none") or word.endswith("n't") for word in found):
        return "no"
    return "yes" if any(word in ("yes", "yeah", "yep", "there") for word in found) else None
