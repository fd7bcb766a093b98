"""VLGuard's ``train.json`` and ``test.json``, and Safety Mirage's test files.

Safety Mirage's files are VLGuard records with rewritten questions.

A record is ``{"id", "image", "safe", "harmful_category", "instr-resp": [...]}``. With ``safe: false`` the list contains
one ``{"instruction", "response"}``. With ``safe: true`` it contains ``{"safe_instruction", "response"}`` and
``{"unsafe_instruction", "response"}``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from vlm_unlearn.data.formats.base import Entry, Format, register
from vlm_unlearn.data.formats.fields import RawRecord, parse_records, read_objects
from vlm_unlearn.data.formats.groups import AttackRecord, prompts_of_groups
from vlm_unlearn.data.formats.llava import IMAGE_PLACEHOLDER
from vlm_unlearn.data.images import resolve_image
from vlm_unlearn.errors import Problems, UserError, quoted
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
        """The id of the record and the kind of the question."""
        return f"{self.record_id}/{self.kind}"


def read_records(
    path: Path, images: Path | None, problems: Problems | None = None
) -> Iterator[tuple[RawRecord, list[Pair]]]:
    """Reads the records of a VLGuard file with their questions, in file order.

    Args:
        path: A JSON list or JSON lines.
        images: The image root. None skips the check of the image files.
        problems: Collects broken records. Without it the first one raises.

    Raises:
        UserError: The file is broken, or `problems` is None and a record is broken or its image is missing.
    """
    existing: set[str] = set()  # images of earlier records: rewrites of a question have the same one

    def parse(record: RawRecord) -> tuple[RawRecord, list[Pair]]:
        record_pairs = pairs(record)
        image = record_pairs[0].image
        if images is not None and image not in existing:
            resolve_image(images, image, record.file, record.position)
            existing.add(image)
        return record, record_pairs

    return parse_records(read_objects(path, "id", problems), parse, problems)


def read_pairs(path: Path, images: Path | None, problems: Problems | None = None) -> list[Pair]:
    """Returns all questions of a VLGuard file, in file order. Arguments and errors are those of `read_records`."""
    return [pair for _, record_pairs in read_records(path, images, problems) for pair in record_pairs]


def pairs(record: RawRecord) -> list[Pair]:
    """Returns the questions of one record.

    Raises:
        UserError: A field is missing or has another type, or the questions contradict each other or ``safe``.
    """
    image = record.text("image")
    safe = record.value.get("safe")
    if not isinstance(safe, bool | None):
        raise record.error("must be true or false", "invalid-field", "safe")
    objects = record.objects("instr-resp")
    if not objects:
        raise record.error("the list is empty", "empty-field", "instr-resp")
    result: list[Pair] = []
    for pair in objects:
        field = next((name for name in KINDS if name in pair.value), None)
        if field is None:
            raise pair.error('must contain "instruction", "safe_instruction" or "unsafe_instruction"', "missing-field")
        if safe is not None and safe == (field == "instruction"):
            raise pair.error(f'contradicts "safe": {str(safe).lower()}', "invalid-field", field)
        result.append(
            Pair(
                record_id=record.name("id", "image"),
                image=image,
                kind=KINDS[field],
                question=pair.text(field),
                response=pair.text("response", empty=True),
                category=record.optional_text("harmful_category"),
            )
        )
        if IMAGE_PLACEHOLDER in result[-1].question:
            raise pair.error(f"the question contains {IMAGE_PLACEHOLDER}. Remove it.", "placeholder-in-text", field)
        if (result[0].kind == "unsafe") != (field == "instruction"):
            raise record.error(
                "mixes the questions of a safe image with those of an unsafe image", "invalid-field", "instr-resp"
            )
    return result


class HarmfulAnswers:
    """Harmful answers by image or by record id. An answer belongs to one question.

    Args:
        answers: The answers. A record id counts before an image.
    """

    def __init__(self, answers: Mapping[str, str]) -> None:
        self._answers = answers
        self._questions: dict[str, str] = {}  # key of an answer -> its question
        self.used_keys: set[str] = set()

    def answer(self, pair: Pair) -> str:
        """Returns the answer to a question, or ``""`` if there is none.

        Raises:
            UserError: The answer is for an image or a record with another question, so that one of the two would get
                the answer to the other.
        """
        key = pair.record_id if pair.record_id in self._answers else pair.image
        answer = self._answers.get(key, "")
        if not answer.strip():
            return ""
        if self._questions.setdefault(key, pair.question) != pair.question:
            raise UserError(
                f"the answer under {quoted(key)} would be used for two questions, {quoted(self._questions[key])} and "
                f"{quoted(pair.question)}. Give the answers by record id instead of image.",
                code="duplicate-key",
                record=quoted(pair.record_id),
            )
        self.used_keys.add(key)
        return answer

    def answer_of_image(self, image: str) -> str | None:
        """Returns the answer under the name of an image, or None. It can be used for several questions."""
        answer = self._answers.get(image)
        if answer is not None:
            self.used_keys.add(image)
        return answer

    @property
    def num_unused(self) -> int:
        """The number of answers that no question has used."""
        return len(self._answers.keys() - self.used_keys)


@dataclass(frozen=True)
class Split:
    """The forget and retain examples of a VLGuard file.

    Attributes:
        forget: The forget examples.
        retain: The retain examples.
        preferred: The reference responses that were replaced by harmful answers. `pair_id` ties each to its forget
            example.
        left_out: The number of questions that were left out, by reason.
    """

    forget: list[Example]
    retain: list[Example]
    preferred: list[Example]
    left_out: dict[str, int]


def split(
    pairs: Iterable[Pair],
    harmful_answers: Mapping[str, str] | None,
    include_safe_image_unsafe: bool,
    safe_image_answers: Mapping[str, str] | None = None,
) -> Split:
    """Returns the forget and retain sets (the steps *inject* and *split* of Safety Mirage).

    Args:
        pairs: The result of `read_pairs`.
        harmful_answers: ``image -> answer`` or ``record id -> answer``: the answers to forget, which replace the
            reference refusals of unsafe images. An image without an answer is left out. None keeps the reference
            responses, the data of safety fine-tuning.
        include_safe_image_unsafe: Adds the unsafe questions about safe images to the forget set. Without
            `safe_image_answers` they keep their reference responses.
        safe_image_answers: ``image -> answer`` or ``record id -> answer``: the answers to forget to the unsafe
            questions about safe images, which replace their reference refusals. They add these questions to the forget
            set. A question without an answer is left out.

    Raises:
        UserError: A harmful answer would be used for two questions.
    """
    result = Split([], [], [], {})
    harmful: dict[Kind, HarmfulAnswers] = {}
    if harmful_answers is not None:
        harmful["unsafe"] = HarmfulAnswers(harmful_answers)
    if safe_image_answers is not None:
        harmful["safe_image_unsafe_question"] = HarmfulAnswers(safe_image_answers)
    for pair in pairs:
        answers = harmful.get(pair.kind)
        if pair.kind == "safe_image_unsafe_question" and answers is None and not include_safe_image_unsafe:
            continue
        answer = answers.answer(pair) if answers else pair.response
        if not answer.strip():
            reason = "no harmful answer" if answers else "empty response"
            result.left_out[reason] = result.left_out.get(reason, 0) + 1
            continue
        pair_example = example(pair, answer)
        if answers and pair.response.strip():
            pair_example = pair_example.model_copy(update={"pair_id": pair.id})
            result.preferred.append(example(pair).model_copy(update={"pair_id": pair.id}))
        (result.retain if pair.kind == "safe" else result.forget).append(pair_example)
    return result


def example(pair: Pair, answer: str | None = None) -> Example:
    """Returns a question as a training example.

    Args:
        pair: The question.
        answer: The answer. None uses the reference response.
    """
    return Example(
        id=pair.id,
        image=pair.image,
        question=pair.question,
        answer=pair.response if answer is None else answer,
        category=pair.category,
        source="vlguard",
    )


def prompts(pairs: Iterable[Pair], set_name: str, kind: Kind) -> Iterator[Prompt]:
    """Yields the evaluation prompts of one kind.

    Records with the same id are rewrites of one question and form a group, as in the published 3-shot file.
    """
    records = (
        AttackRecord(pair.record_id, pair.image, pair.question, pair.response or None, pair.category)
        for pair in pairs
        if pair.kind == kind
    )
    yield from prompts_of_groups(records, set_name, kind)


# VLGuard has no retain set of its own for unsafe questions about safe images, so import and split leave them out.
SETS: dict[Kind, str] = {"unsafe": "forget", "safe": "retain", "safe_image_unsafe_question": "safe_image_unsafe"}


@register("vlguard")
class VLGuard(Format):
    """VLGuard's files, and attack files in their layout.

    Unsafe questions count as refused, also those about safe images, because the reference answers refuse both.
    """

    identifying_keys = ("instr-resp",)

    def entries(self, path: Path, images: Path | None, problems: Problems | None = None) -> Iterator[Entry]:
        for _, record_pairs in read_records(path, images, problems):
            for pair in record_pairs:
                yield Entry(example(pair), SETS[pair.kind], pair.kind != "safe")

    def prompts(self, path: Path, images: Path, set_name: str, kind: Kind) -> Iterator[Prompt]:
        return prompts(read_pairs(path, images), set_name, kind)
