"""The answers of SafeEraser's ``ckpt_infer.py``, and the same file after ``eval_all.py``.

The script copies each record of ``all_train.json`` or ``all_val.json`` and writes its answers into the copy:

- ``unsafe_pairs[].model_response1`` to ``model_response3`` replace ``model_response``: three samples each,
- ``unsafe_pairs[].sd_response``: the answer about the benign image,
- ``UnharmPair_text1.Prediction`` and so on: the answers to the harmless questions.

Where the image of a record does not exist, the script prints a line and leaves the reference answers in their places.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from vlm_unlearn.data.answer_formats.base import AnswerFormat, ForeignAnswer, no_answers, register
from vlm_unlearn.data.formats.fields import RawRecord, read_objects
from vlm_unlearn.data.formats.safe_eraser import HARMLESS_PAIRS
from vlm_unlearn.records import Kind

_SAMPLE = re.compile(r"model_response([1-9]\d{0,2})")


@register("safe_eraser")
class SafeEraserAnswers(AnswerFormat):
    """The files of ``ckpt_infer.py`` and ``eval_all.py``. Questions and images identify the prompts."""

    def answers(self, path: Path) -> Iterator[ForeignAnswer]:
        has_samples = False
        for record in read_objects(path, "image_path"):
            for answer in _record_answers(record):
                has_samples = has_samples or answer.sample is not None
                yield answer
        if not has_samples:
            raise no_answers(
                path,
                "No unsafe pair has a model_response1, so this is a data file with reference answers. "
                "Pass the --output_file of ckpt_infer.py.",
            )


def _record_answers(record: RawRecord) -> Iterator[ForeignAnswer]:
    pairs = record.objects("unsafe_pairs")
    numbered = [[match for key in pair.value if (match := _SAMPLE.fullmatch(key))] for pair in pairs]
    # Without samples the script had no image, and the answers to harmless questions are the references.
    answered = any(numbered)

    def answer(
        source: RawRecord, fields: tuple[str, ...], question: str, image: str, kind: Kind, sample: int | None = None
    ) -> Iterator[ForeignAnswer]:
        field = next((name for name in fields if source.value.get(name) is not None), None)
        if field is None:
            return
        place = f"{source.field}.{field}"
        yield ForeignAnswer(
            lambda: f"{record.position}: {place}",
            source.text(field, empty=True),
            question=source.text(question),
            image=record.text(image),
            kind=kind,
            sample=sample,
            may_be_reference=not answered,
        )

    for pair, matches in zip(pairs, numbered, strict=True):
        for match in matches:
            yield from answer(pair, (match[0],), "question", "image_path", "unsafe", int(match[1]) - 1)
        yield from answer(pair, ("sd_response",), "question", "SDImage_path", "safe_image_unsafe_question")
    for name in HARMLESS_PAIRS:
        if record.value.get(name) is not None:
            pair = record.object(name)
            yield from answer(pair, ("Prediction", "Answer", "Predicti1on"), "Question", "image_path", "safe")
