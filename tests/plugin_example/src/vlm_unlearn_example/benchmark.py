"""A benchmark: how many objects of a kind an image shows."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_unlearn.benchmarks.base import Benchmark, BenchmarkQuestion, QuestionScore
from vlm_unlearn.benchmarks.official_files import SHORT, entries, record, require_answers
from vlm_unlearn.store import read_json


class Counting(Benchmark):
    """An answer is right if its first number is."""

    annotation_file = "counting.json of the example"
    image_folder = "the folder of the example's images"

    def read_questions(
        self, annotations: Path, questions: Path | None, limit: int | None = None
    ) -> list[BenchmarkQuestion]:
        """Reads the questions."""
        listed = []
        for value in _entries(annotations)[:limit]:
            entry = record(annotations, value["id"], value)
            image = entry.text("image")
            listed.append(BenchmarkQuestion(entry.name("id"), f"{entry.text('question')}\n{SHORT}", image, image))
        return listed

    def read_truths(self, annotations: Path, questions: Path | None) -> Mapping[str, Any]:
        """Reads the right numbers."""
        listed = _entries(annotations)
        require_answers(listed, annotations, "answer")
        return {str(entry["id"]): entry for entry in listed}

    def score_answer(self, id: str, truth: Any, text: str, official: bool) -> QuestionScore:
        """Scores one answer."""
        number = re.search(r"\d+", text)
        is_right = number is not None and int(number[0]) == truth["answer"]
        return QuestionScore(id, float(is_right), str(truth["image"]), unparsed=number is None)


def _entries(annotations: Path) -> list[Mapping[str, Any]]:
    return entries(read_json(annotations), annotations, "id", "image", "question")
