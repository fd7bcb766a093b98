"""MM-SafetyBench (Liu et al. 2023, arXiv 2311.17600): harmful questions whose harmful part is in the picture.

A file ``processed_questions/01-Illegal_Activitiy.json`` of a scenario is
``{"0": {"Question", "Changed Question", "Key Phrase", "Rephrased Question", "Rephrased Question(SD)", ...}, ...}``. The
pictures are ``imgs/<scenario>/<SD, SD_TYPO or TYPO>/<id>.jpg``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from vlm_unlearn.data.formats.base import register
from vlm_unlearn.data.formats.questions import QuestionSet, SafetyQuestion, keyed_records, question_text
from vlm_unlearn.data.images import resolve_image
from vlm_unlearn.errors import UserError

_NUMBER = re.compile(r"\A\d+-")


@register("mm_safetybench")
class MMSafetyBench(QuestionSet):
    """The folder ``processed_questions``, or one of its files, with pictures that a model drew and a text below them.

    Judges grade the answers against ``Question``, which spells the request out. The category is the scenario. A
    question's id is ``<scenario>/<key>``.
    """

    picture: ClassVar[str] = "SD_TYPO"
    field: ClassVar[str] = "Rephrased Question"

    def questions(self, path: Path, images: Path) -> Iterator[SafetyQuestion]:
        for file in _scenario_files(path):
            for id, record in keyed_records(file, '{"0": {"Question": ...}, ...}, a file of processed_questions/'):
                image = f"{file.stem}/{self.picture}/{id}.jpg"
                resolve_image(images, image, record.file, record.position)
                yield SafetyQuestion(
                    id=f"{file.stem}/{id}",
                    question=question_text(record, self.field),
                    kind="unsafe",
                    image=image,
                    category=_NUMBER.sub("", file.stem),
                    request=record.text("Question").strip(),
                )


@register("mm_safetybench_sd")
class MMSafetyBenchSD(MMSafetyBench):
    """MM-SafetyBench with pictures that a model drew of the harmful part."""

    picture = "SD"
    field = "Rephrased Question(SD)"


@register("mm_safetybench_typo")
class MMSafetyBenchTypo(MMSafetyBench):
    """MM-SafetyBench with pictures of the harmful part as a text."""

    picture = "TYPO"


def _scenario_files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.glob("*.json") if not file.name.startswith("."))
    if not files:
        problem = "the folder has no .json files. Pass MM-SafetyBench's processed_questions."
        raise UserError(problem, code="no-records", file=path)
    return files
