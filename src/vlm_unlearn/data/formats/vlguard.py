"""VLGuard's ``train.json`` / ``test.json``, and the Safety Mirage test files, which are VLGuard records with rewritten questions.

A record is ``{"id", "image", "safe", "harmful_category", "instr-resp": [...]}``. ``safe: false`` has one
``{"instruction", "response"}``; ``safe: true`` has ``{"safe_instruction", "response"}`` and ``{"unsafe_instruction", "response"}``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from vlm_unlearn.data.formats.fields import RawRecord, parsed, read_objects
from vlm_unlearn.data.formats.groups import prompts_of_groups
from vlm_unlearn.data.formats.llava import IMAGE_MARK
from vlm_unlearn.data.images import resolve_image
from vlm_unlearn.errors import Problems, UserError
from vlm_unlearn.records import Example, Kind, Prompt

KINDS: dict[str, Kind] = {
    "instruction": "unsafe",
    "safe_instruction": "safe",
    "unsafe_instruction": "safe_image_unsafe_question",
}


@dataclass(frozen=True)
class Pair:
    """One question of a VLGuard record with its reference response."""

    record_id: str
    image: str
    kind: Kind
    question: str
    response: str
    category: str | None

    @property
    def id(self) -> str:
        return f"{self.record_id}/{self.kind}"


def read_records(
    path: Path, images: Path | None, problems: Problems | None = None
) -> Iterator[tuple[RawRecord, list[Pair]]]:
    """The records of a VLGuard file with their questions, in file order.

    Args:
        images: the image root; None leaves the files unlooked-at.
        problems: takes broken records; without it the first one raises.

    Raises:
        UserError: a broken file; a broken record or a missing image where `problems` is None.
    """

    def read(record: RawRecord) -> tuple[RawRecord, list[Pair]]:
        found = pairs(record)
        if images is not None:
            resolve_image(images, found[0].image, record.where)
        return record, found

    return parsed(read_objects(path, "id", problems), read, problems)


def read_pairs(path: Path, images: Path | None, problems: Problems | None = None) -> list[Pair]:
    """All questions of a VLGuard file, in file order; arguments and errors as `read_records`."""
    return [pair for _, found in read_records(path, images, problems) for pair in found]


def pairs(record: RawRecord) -> list[Pair]:
    """The questions of one record.

    Raises:
        UserError: a field is missing or is something else, or the pairs don't go with each other or with ``safe``.
    """
    image = record.text("image")
    safe = record.value.get("safe")
    if not isinstance(safe, bool | None):
        raise UserError(f'{record.where}: "safe" must be true or false')
    listed = record.objects("instr-resp")
    if not listed:
        raise UserError(f'{record.where}: "instr-resp" is empty')
    found: list[Pair] = []
    for pair in listed:
        field = next((name for name in KINDS if name in pair.value), None)
        if field is None:
            raise UserError(f'{pair.where}: none of "instruction", "safe_instruction", "unsafe_instruction" is there')
        if safe is not None and safe == (field == "instruction"):
            raise UserError(f'{pair.where}: "{field}" does not go with "safe": {str(safe).lower()}')
        found.append(
            Pair(
                record_id=record.name("id", "image"),
                image=image,
                kind=KINDS[field],
                question=pair.text(field),
                response=pair.text("response", empty=True),
                category=record.optional_text("harmful_category"),
            )
        )
        if IMAGE_MARK in found[-1].question:
            raise UserError(f"{pair.where}: the question holds {IMAGE_MARK}; take it out")
        if (found[0].kind == "unsafe") != (field == "instruction"):
            raise UserError(f"{record.where}: mixes the pairs of a safe and of an unsafe image")
    return found


@dataclass(frozen=True)
class Split:
    """Forget and retain examples, and how many pairs were left out for which reason."""

    forget: list[Example]
    retain: list[Example]
    preferred: list[Example]  # the reference responses in whose place harmful answers were injected; pair_id ties them
    left_out: dict[str, int]


def split(pairs: Iterable[Pair], harmful_answers: Mapping[str, str] | None, include_safe_image_unsafe: bool) -> Split:
    """Forget and retain sets (Safety Mirage's *inject* and *split*).

    Args:
        pairs: what `read_pairs` gives.
        harmful_answers: ``image -> answer`` to forget, in place of the reference refusal of an unsafe image; an image without
            one is left out. None keeps the reference responses: the data of safety fine-tuning.
        include_safe_image_unsafe: whether unsafe questions on safe images join the forget set (with their reference
            response: no model has answered them harmfully).
    """
    found = Split([], [], [], {})
    for pair in pairs:
        if pair.kind == "safe_image_unsafe_question" and not include_safe_image_unsafe:
            continue
        injected = pair.kind == "unsafe" and harmful_answers is not None
        answer = (harmful_answers or {}).get(pair.image, "") if injected else pair.response
        if not answer.strip():
            reason = "no harmful answer" if injected else "empty response"
            found.left_out[reason] = found.left_out.get(reason, 0) + 1
            continue
        made = example(pair, answer)
        if injected and pair.response.strip():
            made = made.model_copy(update={"pair_id": pair.id})
            found.preferred.append(example(pair).model_copy(update={"pair_id": pair.id}))
        (found.retain if pair.kind == "safe" else found.forget).append(made)
    return found


def example(pair: Pair, answer: str | None = None) -> Example:
    """A question as a training example, answered by its reference response or another answer."""
    given = pair.response if answer is None else answer
    return Example(
        id=pair.id, image=pair.image, question=pair.question, answer=given, category=pair.category, source="vlguard"
    )


def prompts(pairs: Iterable[Pair], set_name: str, kind: Kind) -> Iterator[Prompt]:
    """Evaluation prompts of one kind. Rows with the same record id are shots of one group, as in the published 3-shot file."""
    asked = (
        (pair.record_id, pair.image, pair.question, pair.response or None, pair.category)
        for pair in pairs
        if pair.kind == kind
    )
    yield from prompts_of_groups(asked, set_name, kind)
