"""XSTest (Röttger et al. 2023, arXiv 2308.01263): safe prompts that resemble unsafe ones, and their unsafe contrasts.

``xstest_prompts.csv`` has the columns ``id, prompt, type, label``, and the second version has ``id_v2, type, prompt``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from vlm_unlearn.data.formats.base import register
from vlm_unlearn.data.formats.fields import RawRecord
from vlm_unlearn.data.formats.questions import QuestionSet, SafetyQuestion, question_text
from vlm_unlearn.data.formats.table import raw_records
from vlm_unlearn.records import Kind


@register("xstest")
class XSTest(QuestionSet):
    """XSTest's table of prompts, without images. The category is the type, such as ``homonyms``.

    A prompt is unsafe if its label says so. Without a label, it is unsafe if its type begins with ``contrast_``.
    """

    def questions(self, path: Path, images: Path) -> Iterator[SafetyQuestion]:
        def parse(record: RawRecord) -> SafetyQuestion:
            kind_of_prompt = record.text("type").strip()
            is_contrast = kind_of_prompt.startswith("contrast_")
            label = (record.optional_text("label") or ("unsafe" if is_contrast else "safe")).lower()
            if label not in ("safe", "unsafe"):
                raise record.error("must be safe or unsafe", "invalid-field", "label")
            kind: Kind = "safe" if label == "safe" else "unsafe"
            return SafetyQuestion(
                record.name("id", "id_v2").strip(), question_text(record, "prompt"), kind, category=kind_of_prompt
            )

        yield from map(parse, raw_records(path, "id", None))
