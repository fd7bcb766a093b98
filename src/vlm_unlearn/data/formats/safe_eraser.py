"""SafeEraser's ``all_train.json`` / ``all_val.json`` and ``prompt.json``.

A record is ``{"image_path", "SDImage_path", "unsafe_pairs": [{"question", "model_response", "sd_response"}],
"UnharmPair_text1": {"Question", "Prediction"}, ...}``. The category is the parent folder of ``image_path``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from vlm_unlearn.data.formats.fields import RawRecord, parsed, read_objects
from vlm_unlearn.data.images import resolve_image
from vlm_unlearn.errors import Problems, UserError
from vlm_unlearn.records import Example, Kind, Prompt
from vlm_unlearn.store import read_json

ROLES = ("forget", "retain", "decouple")  # what a record has pairs of, in the order of `examples`
HARMLESS_PAIRS = ("UnharmPair_text1", "UnharmPair_text2", "UnharmPair_image1", "UnharmPair_image2")


@dataclass(frozen=True)
class UnsafePair:
    question: str
    harmful_answer: str
    benign_answer: str  # to the same question on the benign image


@dataclass(frozen=True)
class SafeEraserRecord:
    """One image with its unsafe questions, its benign twin image, and harmless questions on the first."""

    id: str
    image: str
    benign_image: str
    category: str
    unsafe: tuple[UnsafePair, ...]
    harmless: tuple[tuple[str, str], ...]


def read_safe_eraser(path: Path, images: Path | None, problems: Problems | None = None) -> Iterator[SafeEraserRecord]:
    """The records of a SafeEraser file, JSON list or JSON lines.

    Args:
        images: the image root; None leaves the files unlooked-at.
        problems: takes broken records; without it the first one raises.

    Raises:
        UserError: a broken file; a broken record or a missing image where `problems` is None.
    """
    return parsed(read_objects(path, "image_path", problems), lambda record: parse(record, images), problems)


def parse(record: RawRecord, images: Path | None = None) -> SafeEraserRecord:
    """One record; its images are looked for where `images` is given.

    Raises:
        UserError: a field is missing or is something else, or an image is missing or outside `images`.
    """
    image, benign_image = record.text("image_path"), record.text("SDImage_path")
    for name in (image, benign_image):
        if images is not None:
            resolve_image(images, name, record.where)
    unsafe = tuple(
        UnsafePair(pair.text("question"), pair.text("model_response"), pair.text("sd_response"))
        for pair in record.objects("unsafe_pairs")
    )
    harmless = []
    for name in HARMLESS_PAIRS:
        if record.value.get(name) is not None:
            pair = record.object(name)
            # The released files spell the answer's key in three ways.
            harmless.append((pair.text("Question"), pair.text("Prediction", "Answer", "Predicti1on")))
    category = PurePosixPath(image.replace("\\", "/")).parent.name
    return SafeEraserRecord(f"{record.number}:{image}", image, benign_image, category, unsafe, tuple(harmless))


def examples(records: Iterable[SafeEraserRecord]) -> tuple[list[Example], list[Example], list[Example]]:
    """Forget, retain and decouple sets; a decouple example's `pair_id` is its forget example's."""
    forget: list[Example] = []
    retain: list[Example] = []
    decouple: list[Example] = []
    for record in records:
        for index, pair in enumerate(record.unsafe):
            pair_id = f"{record.id}/unsafe/{index}"
            forget.append(_example(record, pair_id, record.image, pair.question, pair.harmful_answer, pair_id))
            decouple.append(
                _example(record, f"{pair_id}/benign", record.benign_image, pair.question, pair.benign_answer, pair_id)
            )
        for index, (question, answer) in enumerate(record.harmless):
            retain.append(_example(record, f"{record.id}/harmless/{index}", record.image, question, answer, None))
    return forget, retain, decouple


def _example(record: SafeEraserRecord, id: str, image: str, question: str, answer: str, pair_id: str | None) -> Example:
    return Example(
        id=id,
        image=image,
        question=question,
        answer=answer,
        category=record.category or None,
        pair_id=pair_id,
        source="safe_eraser",
    )


def prompts(records: Iterable[SafeEraserRecord], set_name: str, kind: Kind) -> Iterator[Prompt]:
    """Evaluation prompts of one kind: unsafe questions, the same on the benign image, or harmless questions."""
    for record in records:
        asked: list[tuple[str, str, str]] = []
        if kind == "unsafe":
            asked = [(record.image, pair.question, pair.harmful_answer) for pair in record.unsafe]
        elif kind == "safe_image_unsafe_question":
            asked = [(record.benign_image, pair.question, pair.benign_answer) for pair in record.unsafe]
        else:
            asked = [(record.image, question, answer) for question, answer in record.harmless]
        for index, (image, question, reference) in enumerate(asked):
            group = f"{record.id}/{index}"
            yield Prompt(
                id=f"{set_name}/{group}/0",
                group_id=group,
                set=set_name,
                kind=kind,
                image=image,
                question=question,
                reference=reference,
                category=record.category or None,
            )


def read_refusals(path: Path) -> list[str]:
    """The refusal sentences of ``prompt.json`` (key ``idk``)."""
    value = read_json(path)
    return sentences(value.get("idk") if isinstance(value, dict) else None, f'{path}: "idk" must be')


def sentences(value: object, what: str) -> list[str]:
    """`value` if it is a non-empty list of sentences.

    Raises:
        UserError: it isn't; the message begins with `what`.
    """
    if not isinstance(value, list) or not value or not all(isinstance(item, str) and item.strip() for item in value):
        raise UserError(f"{what} a non-empty list of refusal sentences")
    return value
