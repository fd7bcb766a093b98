"""VQAv2 (Goyal et al. 2017, arXiv 1612.00837)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_unlearn.benchmarks.base import Benchmark, Scored, annotated_questions, register
from vlm_unlearn.benchmarks.vqa_text import leave_one_out, one_line, plain_words, strip_punctuation


@register("vqav2", "v2_mscoco_val2014_annotations.json of visualqa.org")
class VQAv2(Benchmark):
    """Accuracy against ten annotators. The official code normalises texts only where the annotators disagree; by default always."""

    def load(self, annotations: Path, questions: Path | None) -> Mapping[str, Any]:
        return annotated_questions(annotations, "annotations")

    def grade(self, id: str, truth: Any, text: str, official: bool) -> Scored:
        return Scored(id, accuracy(text, truth["answers"], official), truth["image"], truth["type"])


def accuracy(prediction: str, answers: list[str], official: bool) -> float:
    """VQAv2's accuracy of one answer, 0 to 1."""
    prediction, answers = one_line(prediction), [one_line(answer) for answer in answers]
    if len(set(answers)) > 1 or not official:
        prediction, *answers = (plain_words(strip_punctuation(text)) for text in (prediction, *answers))
    return leave_one_out(prediction, answers)
