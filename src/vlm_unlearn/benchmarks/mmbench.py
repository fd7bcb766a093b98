"""MMBench (Liu et al. 2023, arXiv 2307.06281), circular: right means right under every order of the options."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_unlearn.benchmarks.base import Benchmark, Scored, register
from vlm_unlearn.benchmarks.scienceqa import parse
from vlm_unlearn.errors import RequestError

ROTATION = 1_000_000  # added to a question's index for each further order of its options


@register("mmbench", "mmbench_dev_en_20231003.tsv (circular) or another TSV of the MMBench repository that has answers")
class MMBench(Benchmark):
    """Share of questions right under all rotations. An answer without an option is wrong, never a random option; the published
    evaluator asks a language model to find one."""

    def load(self, annotations: Path, questions: Path | None) -> Mapping[str, Any]:
        csv.field_size_limit(2**31 - 1)  # an image is a field
        found: dict[str, Any] = {}
        try:
            with annotations.open(encoding="utf-8-sig", newline="") as handle:
                for number, row in enumerate(csv.DictReader(handle, delimiter="\t"), start=1):
                    choices = [row[letter] for letter in "ABCD" if row.get(letter)]
                    index, answer = str(row.get("index") or ""), str(row.get("answer") or "")
                    if not index.isdigit() or len(answer) != 1 or answer not in "ABCD"[: len(choices)]:
                        raise RequestError(
                            f'{annotations}: row {number} must have "index", options "A" to "D", and one of them as "answer"'
                        )
                    truth = {"choices": choices, "answer": "ABCD".index(answer), "category": row.get("l2-category") or row.get("category")}
                    found[index] = truth
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            reason = getattr(error, "strerror", None) or "is not a tab-separated text file"
            raise RequestError(f"{annotations}: {reason}") from None
        if not found:
            raise RequestError(f"{annotations}: holds no questions")
        return found

    def grade(self, id: str, truth: Any, text: str, official: bool) -> Scored:
        option = parse(text, truth["choices"], official=False)
        return Scored(id, float(option == truth["answer"]), str(int(id) % ROTATION), str(truth["category"] or ""), unparsed=option < 0)

    def merged(self, graded: Sequence[Scored], truths: Mapping[str, Any]) -> list[Scored]:
        """One score a question, of those whose every rotation has an answer."""
        wanted: dict[str, int] = {}
        for index in truths:
            group = str(int(index) % ROTATION)
            wanted[group] = wanted.get(group, 0) + 1
        groups: dict[str, list[Scored]] = {}
        for one in graded:
            groups.setdefault(one.cluster, []).append(one)
        return [
            Scored(group, float(all(one.value for one in found)), group, found[0].part, any(one.unparsed for one in found))
            for group, found in groups.items()
            if len(found) == wanted[group]
        ]
