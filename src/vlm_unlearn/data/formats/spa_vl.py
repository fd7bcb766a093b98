"""The questions of SPA-VL (Zhang et al. 2024, arXiv 2406.12030).

A row is ``{"image", "question", "class1", "class2", "class3"}``, with ``chosen`` and ``rejected`` in the training
data. The test set has the files ``harm`` and ``help``. Question files of LLaVA's scripts, with the fields
``question_id``, ``image`` and ``text``, are read too, because Safety Mirage's evaluation has SPA-VL's questions in that
form.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from vlm_unlearn.data.formats.base import register
from vlm_unlearn.data.formats.fields import RawRecord
from vlm_unlearn.data.formats.questions import QuestionSet, SafetyQuestion, question_text
from vlm_unlearn.data.formats.table import raw_records
from vlm_unlearn.data.formats.table_rows import row_image
from vlm_unlearn.data.image_paths import UNPACKED
from vlm_unlearn.records import Kind
from vlm_unlearn.store import cache_folder


@register("spa_vl")
class SPAVL(QuestionSet):
    """SPA-VL's rows as parquet, JSON or JSON lines. The reference is ``chosen``, and the category is ``class1``.

    The questions of a file whose name begins with ``help`` are safe, and those of every other file are unsafe.
    """

    def questions(self, path: Path, images: Path) -> Iterator[SafetyQuestion]:
        kind: Kind = "safe" if path.name.lower().startswith("help") else "unsafe"

        def parse(record: RawRecord) -> SafetyQuestion:
            has_id = any(record.value.get(name) is not None for name in ("id", "question_id"))
            image, source = row_image(record, record.value.get("image"), "image", images, cache_folder() / UNPACKED)
            if image is None:
                raise record.error("the row has no image", "missing-field", "image")
            return SafetyQuestion(
                id=record.name("id", "question_id") if has_id else str(record.number),
                question=question_text(record, "question", "text"),
                kind=kind,
                image=image,
                category=record.optional_text("class1"),
                reference=record.optional_text("chosen"),
                is_embedded=source == "embedded",
            )

        yield from map(parse, raw_records(path, "id", None))
