"""VizWiz VQA (Gurari et al. 2018, arXiv 1802.08218)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_unlearn.benchmarks.base import Benchmark, Scored, entries, register, ten_answers
from vlm_unlearn.benchmarks.vqa_text import evalai, leave_one_out
from vlm_unlearn.store import read_json


@register("vizwiz", "val.json of vizwiz.org")
class VizWiz(Benchmark):
    """Accuracy against ten annotators as lmms-eval counts it; a question's id is its image's name."""

    def load(self, annotations: Path, questions: Path | None) -> Mapping[str, Any]:
        listed = entries(read_json(annotations), str(annotations), "image", "answers")
        return {
            str(entry["image"]): {
                "answers": ten_answers(entry, f"{annotations}: {entry['image']}"),
                "type": str(entry.get("answer_type", "")),
            }
            for entry in listed
        }

    def grade(self, id: str, truth: Any, text: str, official: bool) -> Scored:
        return Scored(id, leave_one_out(evalai(text), [evalai(answer) for answer in truth["answers"]]), id, truth["type"])
