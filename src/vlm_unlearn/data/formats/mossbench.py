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
from vlm_unlearn.data.images import resolve_image

STIMULI = {
    "type 1": "Exaggerated Risk",
    "type 2": "Negated Harm",
    "type 3": "Counterintuitive Interpretation",
}


@register("mossbench")
class MOSSBench(QuestionSet):
    """``information.json`` or ``information.csv``. The category is the type of stimulus.

    The questions are safe, so that a refusal is over-refusal. Those of the contrast set, whose records do not name a
    type of harm that the picture only suggests, are unsafe.
    """

    def questions(self, path: Path, images: Path) -> Iterator[SafetyQuestion]:
        is_json = suffix(path) == ".json"
        keyed = keyed_records(path, '{"1": {"question": ...}, ...}, MOSSBench\'s information.json') if is_json else []
        records = (record for _, record in keyed) if is_json else raw_records(path, "pid", None)

        def parse(record: RawRecord) -> SafetyQuestion:
            metadata = record.object("metadata") if is_json else record
            prefix = "" if is_json else "meta_data_"
            stimulus = metadata.text(f"{prefix}over").strip()
            image = record.text("image", "image_path")
            resolve_image(images, image, record.file, record.position)
            return SafetyQuestion(
                id=record.name("pid").strip(),
                question=question_text(record, "question"),
                kind="safe" if f"{prefix}harm" in metadata.value else "unsafe",
                image=image,
                category=STIMULI.get(stimulus, stimulus),
            )

        yield from map(parse, records)
