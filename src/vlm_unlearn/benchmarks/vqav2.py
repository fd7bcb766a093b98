"""VQAv2 (Goyal et al. 2017, arXiv 1612.00837)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_unlearn.benchmarks.base import Benchmark, Scored, entries, register, ten_answers
from vlm_unlearn.benchmarks.vqa_text import leave_one_out, one_line, plain_words, strip_punctuation
from vlm_unlearn.errors import RequestError
from vlm_unlearn.store import read_json


@register("vqav2", "v2_mscoco_val2014_annotations.json of visualqa.org")
class VQAv2(Benchmark):
    """Accuracy against ten annotators. The official code normalises texts only where the annotators disagree; by default always."""

    def load(self, annotations: Path, questions: Path | None) -> Mapping[str, Any]:
        value = read_json(annotations)
        if not isinstance(value, dict) or "annotations" not in value:
            raise RequestError(f'{annotations}: expected {{"annotations": [...]}}, VQAv2\'s annotation file')
        listed = entries(value["annotations"], str(annotations), "question_id", "answers")
        return {
            str(entry["question_id"]): {
                "answers": ten_answers(entry, f"{annotations}: question {entry['question_id']}"),
                "image": str(entry.get("image_id", entry["question_id"])),
                "type": str(entry.get("answer_type", "")),
            }
            for entry in listed
        }

    def grade(self, id: str, truth: Any, text: str, official: bool) -> Scored:
        return Scored(id, accuracy(text, truth["answers"], official), truth["image"], truth["type"])


def accuracy(prediction: str, answers: list[str], official: bool) -> float:
    """VQAv2's accuracy of one answer, 0 to 1."""
    prediction, answers = one_line(prediction), [one_line(answer) for answer in answers]
    if len(set(answers)) > 1 or not official:
        prediction, *answers = (plain_words(strip_punctuation(text)) for text in (prediction, *answers))
    return leave_one_out(prediction, answers)
