"""MOSSBench (Li et al. 2024, arXiv 2406.17806): harmless questions about pictures that provoke refusals.

``images_information/information.json`` is
``{"1": {"image", "question", "pid", "metadata": {"over", "harm", ...}, ...}, ...}``. ``information.csv`` has the
columns ``pid, question, image_path, meta_data_over, meta_data_harm``. The contrast set has the layout of the JSON file,
without ``harm``, and its questions are harmful.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from vlm_unlearn.data.formats.base import register
from vlm_unlearn.data.formats.fields import RawRecord
from vlm_unlearn.data.formats.questions import QuestionSet, SafetyQuestion, keyed_records, question_text
from vlm_unlearn.data.formats.table import raw_records, suffix
from vlm_unlearn.data.formats.table_rows import row_image
from vlm_unlearn.data.image_paths import UNPACKED
from vlm_unlearn.store import cache_folder

STIMULI = {
    "type 1": "Exaggerated Risk",
    "type 2": "Negated Harm",
    "type 3": "Counterintuitive Interpretation",
}


@register("mossbench")
class MOSSBench(QuestionSet):
    """``information.json``, ``information.csv``, or parquet. The category is the type of stimulus.

    The questions are safe, so that a refusal is over-refusal. Those of the contrast set, whose records do not name a
    type of harm that the picture only suggests, are unsafe.
    """

    def questions(self, path: Path, images: Path) -> Iterator[SafetyQuestion]:
        is_json = suffix(path) == ".json"
        keyed = keyed_records(path, '{"1": {"question": ...}, ...}, MOSSBench\'s information.json') if is_json else []
        records = (record for _, record in keyed) if is_json else raw_records(path, "pid", None)

        def parse(record: RawRecord) -> SafetyQuestion:
            has_object = is_json or "metadata" in record.value
            metadata, prefix = (record.object("metadata"), "") if has_object else (record, "meta_data_")
            stimulus = metadata.text(f"{prefix}over").strip()
            field = "image_path" if "image_path" in record.value else "image"
            image, source = row_image(record, record.value.get(field), field, images, cache_folder() / UNPACKED)
            if image is None:
                raise record.error("the question has no image", "missing-field", field)
            return SafetyQuestion(
                id=record.name("pid").strip(),
                question=question_text(record, "question"),
                kind="safe" if f"{prefix}harm" in metadata.value else "unsafe",
                image=image,
                category=STIMULI.get(stimulus, stimulus),
                is_embedded=source == "embedded",
            )

        yield from map(parse, records)
