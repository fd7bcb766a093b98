"""SafeEraser's ``all_train.json``, ``all_val.json`` and ``prompt.json``.

A record is ``{"image_path", "SDImage_path", "unsafe_pairs": [{"question", "model_response", "sd_response"}],
"UnharmPair_text1": {"Question", "Prediction"}, ...}``. The category is the parent folder of ``image_path``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from vlm_unlearn.data.formats.base import Entry, Format, register
from vlm_unlearn.data.formats.fields import RawRecord, parse_records, read_objects
from vlm_unlearn.data.images import resolve_image
from vlm_unlearn.errors import Problems, UserError
from vlm_unlearn.records import Example, Kind, Prompt
from vlm_unlearn.store import read_json

ROLES = ("forget", "retain", "decouple")  # the sets of a record's pairs, in the order of `examples`
HARMLESS_PAIRS = ("UnharmPair_text1", "UnharmPair_text2", "UnharmPair_image1", "UnharmPair_image2")


@dataclass(frozen=True)
class UnsafePair:
    """An unsafe question, its harmful answer, and the answer to the same question about the benign image."""

    question: str
    harmful_answer: str
    benign_answer: str


@dataclass(frozen=True)
class SafeEraserRecord:
    """An unsafe image with its unsafe and harmless questions, and the benign image that replaces it."""

    id: str
    image: str
    benign_image: str
    category: str
    unsafe: tuple[UnsafePair, ...]
    harmless: tuple[tuple[str, str], ...]


def read_safe_eraser(path: Path, images: Path | None, problems: Problems | None = None) -> Iterator[SafeEraserRecord]:
    """Reads the records of a SafeEraser file, one at a time.

    Args:
        path: A JSON list or JSON lines.
        images: The image root. None skips the check of the image files.
        problems: Collects broken records. Without it the first one raises.

    Raises:
        UserError: The file is broken, or `problems` is None and a record is broken or an image is missing.
    """
    return parse_records(read_objects(path, "image_path", problems), lambda record: parse(record, images), problems)


def parse(record: RawRecord, images: Path | None = None) -> SafeEraserRecord:
    """Parses one record.

    Args:
        record: The record.
        images: The image root. None skips the check of the image files.

    Raises:
        UserError: A field is missing or has another type, or an image is missing or outside `images`.
    """
    image, benign_image = record.text("image_path"), record.text("SDImage_path")
    for name in (image, benign_image):
        if images is not None:
            resolve_image(images, name, record.file, record.position)
    unsafe = tuple(
        UnsafePair(pair.text("question"), pair.text("model_response"), pair.text("sd_response"))
        for pair in record.objects("unsafe_pairs")
    )
    harmless = []
    for name in HARMLESS_PAIRS:
        if record.value.get(name) is not None:
            pair = record.object(name)
            # The released files have three spellings of this key.
            harmless.append((pair.text("Question"), pair.text("Prediction", "Answer", "Predicti1on")))
    category = PurePosixPath(image.replace("\\", "/")).parent.name
    return SafeEraserRecord(f"{record.number}:{image}", image, benign_image, category, unsafe, tuple(harmless))


def examples(records: Iterable[SafeEraserRecord]) -> tuple[list[Example], list[Example], list[Example]]:
    """Returns the forget, retain and decouple sets.

    A decouple example has the same `pair_id` as its forget example.
    """
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
    """Yields the evaluation prompts of one kind.

    Args:
        records: The records of a file.
        set_name: The name of the split.
        kind: ``unsafe``: the unsafe questions about the unsafe image. ``safe_image_unsafe_question``: the same
            questions about the benign image. ``safe``: the harmless questions about the unsafe image.
    """
    for record in records:
        pairs: list[tuple[str, str, str]] = []  # image, question, reference answer
        if kind == "unsafe":
            pairs = [(record.image, pair.question, pair.harmful_answer) for pair in record.unsafe]
        elif kind == "safe_image_unsafe_question":
            pairs = [(record.benign_image, pair.question, pair.benign_answer) for pair in record.unsafe]
        else:
            pairs = [(record.image, question, answer) for question, answer in record.harmless]
        for index, (image, question, reference) in enumerate(pairs):
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
    """Returns the refusal sentences of a ``prompt.json``, which are under the key ``idk``.

    Raises:
        UserError: The file cannot be read, or the key is not a non-empty list of sentences.
    """
    value = read_json(path)
    return validate_refusals(value.get("idk") if isinstance(value, dict) else None, path, "idk")


def validate_refusals(value: object, file: Path | None, field: str | None = None) -> list[str]:
    """Returns `value` if it is a non-empty list of sentences.

    Args:
        value: A JSON value.
        file: The file that contains the value, for the error. None for a value in memory.
        field: The key of the value, for the error.

    Raises:
        UserError: `value` is not a non-empty list of sentences.
    """
    if not isinstance(value, list) or not value or not all(isinstance(item, str) and item.strip() for item in value):
        raise UserError("must be a non-empty list of refusal sentences", code="invalid-field", file=file, field=field)
    return value


@register("safe_eraser")
class SafeEraser(Format):
    """SafeEraser's files. Its questions about benign images form the decouple set, and are to be answered."""

    identifying_keys = ("unsafe_pairs", "SDImage_path")

    def entries(self, path: Path, images: Path | None, problems: Problems | None = None) -> Iterator[Entry]:
        for record in read_safe_eraser(path, images, problems):
            for name, role_examples in zip(ROLES, examples([record]), strict=True):
                for example in role_examples:
                    yield Entry(example, name, name == "forget")

    def prompts(self, path: Path, images: Path, set_name: str, kind: Kind) -> Iterator[Prompt]:
        return prompts(read_safe_eraser(path, images), set_name, kind)
