"""TextVQA (Singh et al. 2019, arXiv 1904.08920)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_unlearn.benchmarks.base import Benchmark, Scored, entries, register, ten_answers
from vlm_unlearn.benchmarks.vqa_text import evalai, leave_one_out
from vlm_unlearn.errors import RequestError
from vlm_unlearn.store import read_json


@register("textvqa", "TextVQA_0.5.1_val.json of textvqa.org")
class TextVQA(Benchmark):
    """Accuracy against ten annotators, EvalAI's normalisation on all texts."""

    def load(self, annotations: Path, questions: Path | None) -> Mapping[str, Any]:
        value = read_json(annotations)
        if not isinstance(value, dict) or "data" not in value:
            raise RequestError(f'{annotations}: expected {{"data": [...]}}, TextVQA\'s annotation file')
        listed = entries(value["data"], str(annotations), "question_id", "answers")
        return {
            str(entry["question_id"]): {
                "answers": ten_answers(entry, f"{annotations}: question {entry['question_id']}"),
                "image": str(entry.get("image_id", entry["question_id"])),
            }
            for entry in listed
        }

    def grade(self, id: str, truth: Any, text: str, official: bool) -> Scored:
        return Scored(id, leave_one_out(evalai(text), [evalai(answer) for answer in truth["answers"]]), truth["image"])
