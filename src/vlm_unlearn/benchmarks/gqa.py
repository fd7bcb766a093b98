"""GQA (Hudson and Manning 2019, arXiv 1902.09506)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_unlearn.benchmarks.base import Benchmark, Scored, register
from vlm_unlearn.errors import RequestError, shown
from vlm_unlearn.store import read_json


@register("gqa", "testdev_balanced_questions.json of the GQA download")
class GQA(Benchmark):
    """Exact match once a closing full stop is off and case is folded."""

    def load(self, annotations: Path, questions: Path | None) -> Mapping[str, Any]:
        value = read_json(annotations)
        if not isinstance(value, dict) or not value:
            raise RequestError(f"{annotations}: expected an object, question id -> question")
        for id, entry in value.items():
            if not isinstance(entry, dict) or not isinstance(entry.get("answer"), str):
                raise RequestError(f'{annotations}: question {shown(id)} has no "answer"')
        return value

    def grade(self, id: str, truth: Any, text: str, official: bool) -> Scored:
        said = text if official else text.strip()
        right = said.rstrip(".").lower() == str(truth["answer"]).lower()
        kinds = truth.get("types")
        part = str(kinds.get("structural", "")) if isinstance(kinds, dict) else ""
        return Scored(id, float(right), str(truth.get("imageId", id)), part)
