"""TextVQA (Singh et al. 2019, arXiv 1904.08920)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_unlearn.benchmarks.base import Benchmark, Scored, annotated_questions, register
from vlm_unlearn.benchmarks.vqa_text import evalai, leave_one_out


@register("textvqa", "TextVQA_0.5.1_val.json of textvqa.org")
class TextVQA(Benchmark):
    """Accuracy against ten annotators, EvalAI's normalisation on all texts."""

    def load(self, annotations: Path, questions: Path | None) -> Mapping[str, Any]:
        return annotated_questions(annotations, "data")

    def grade(self, id: str, truth: Any, text: str, official: bool) -> Scored:
        return Scored(id, leave_one_out(evalai(text), [evalai(answer) for answer in truth["answers"]]), truth["image"])
