"""LLaVA's conversation format.

A record is ``{"id", "image", "conversations": [{"from": "human", "value"}, {"from": "gpt", "value"}, ...]}``. The
placeholder ``<image>`` can be anywhere in a human turn. The image always comes first, as in LLaVA's training, so that
the position of the placeholder in the text does not matter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from vlm_unlearn.data.formats.base import Entry, Format, register
from vlm_unlearn.data.formats.fields import RawRecord, parse_records, read_objects
from vlm_unlearn.data.images import resolve_image
from vlm_unlearn.errors import Problems, UserError, quoted
from vlm_unlearn.records import Example, Round

IMAGE_PLACEHOLDER = "<image>"
_ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}


class Conversation(NamedTuple):
    """The image of a record and its rounds of question and answer, without image placeholders."""

    id: str
    image: str | None
    rounds: list[tuple[str, str]]


def parse(record: RawRecord, empty_answers: bool = False) -> Conversation:
    """Parses one record.

    Args:
        record: The record.
        empty_answers: Accepts empty gpt turns. They cannot be trained on, but conversions of files keep them.

    Raises:
        UserError: A field is missing, the turns do not alternate, a turn is empty, or placeholders and images do not
            match.
    """
    turns = record.objects("conversations")
    roles = [_ROLES.get(turn.text("from")) for turn in turns]
    if not turns or roles != ["human", "gpt"] * (len(turns) // 2):
        raise record.error(
            "must be human and gpt turns in alternation. The first turn is human, the last is gpt.",
            "invalid-field",
            "conversations",
        )
    image = _image(record)
    rounds = []
    placeholders = 0
    for human, gpt in zip(turns[::2], turns[1::2], strict=True):
        value = human.text("value")
        placeholders += value.count(IMAGE_PLACEHOLDER)
        question = value.replace(IMAGE_PLACEHOLDER, "").strip()
        if not question:
            raise human.error("the question is empty", "empty-field", "value")
        answer = gpt.text("value", empty=empty_answers)
        if IMAGE_PLACEHOLDER in answer:
            raise gpt.error(f"the answer contains {IMAGE_PLACEHOLDER}. Remove it.", "placeholder-in-text", "value")
        rounds.append((question, answer))
    if placeholders > 1:
        raise record.error(
            f"contains {placeholders} {IMAGE_PLACEHOLDER} placeholders. A record has at most one image.",
            "placeholder-in-text",
            "conversations",
        )
    if placeholders and image is None:
        raise record.error(
            f'contains {IMAGE_PLACEHOLDER}, but the record has no field "image"', "missing-field", "conversations"
        )
    name = record.name("id") if record.value.get("id") is not None else ""
    return Conversation(name, image, rounds)


def _image(record: RawRecord) -> str | None:
    """Returns the image of a record, which some writers put into a list."""
    field = "images" if record.value.get("image") is None else "image"  # "images" in files of LLaMA-Factory
    value = record.value.get(field)
    if not isinstance(value, list):
        return record.text(field) if value not in (None, "") else None
    if len(value) > 1 or not all(isinstance(image, str) and image.strip() for image in value):
        raise record.error("must be a path, or a list of one path", "invalid-field", field)
    return value[0] if value else None


def read_llava(path: Path, images: Path | None, problems: Problems | None = None) -> Iterator[Example]:
    """Reads conversations as examples, one at a time.

    The last round becomes the question and the answer of the example. The earlier rounds become its history.

    Args:
        path: A JSON list or JSON lines.
        images: The image root. None skips the check of the image files.
        problems: Collects broken records. Without it the first one raises.

    Raises:
        UserError: The file is broken, or `problems` is None and a record is broken or its image is missing.
    """

    def parse_example(record: RawRecord) -> Example:
        conversation = parse(record)
        if conversation.image is not None and images is not None:
            resolve_image(images, conversation.image, record.file, record.position)
        return example(conversation, record.number)

    return parse_records(read_objects(path, "id", problems), parse_example, problems)


def example(conversation: Conversation, number: int) -> Example:
    """Returns the last round as an example, with the earlier rounds as its history.

    Args:
        conversation: The conversation.
        number: The id of the example if the record has none.
    """
    *history, (question, answer) = conversation.rounds
    return Example(
        id=conversation.id or str(number),
        image=conversation.image,
        question=question,
        answer=answer,
        history=tuple(Round(question=question, answer=answer) for question, answer in history),
        source="llava",
    )


def is_complete(value: object, plain: bool) -> bool:
    """Returns whether a JSON value is certain to be a conversation that `parse` accepts.

    The check is fast, and never True for a value that `parse` rejects. It can be False for a value that `parse`
    accepts.

    Args:
        value: The JSON value of a record.
        plain: Whether all texts in it are ASCII without NUL characters.
    """
    if not plain:
        return False
    turns = value.get("conversations") if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(turns, list) or not turns or len(turns) % 2:
        return False
    placeholders = 0
    for index, turn in enumerate(turns):
        if not isinstance(turn, dict) or turn.get("from") != ("gpt" if index % 2 else "human"):
            return False
        text = turn.get("value")
        if not isinstance(text, str) or not text or text.isspace():
            return False
        if IMAGE_PLACEHOLDER in text:
            placeholders += 1
            if index % 2 or text.count(IMAGE_PLACEHOLDER) > 1 or not text.replace(IMAGE_PLACEHOLDER, "").strip():
                return False
    image = value.get("image")
    if image is None and "images" in value:
        return False
    name = value.get("id", "none")
    if not isinstance(name, str) or not name.strip():
        return False
    return placeholders == 0 if image is None else placeholders <= 1 and isinstance(image, str) and bool(image.strip())


def record(id: str | int, image: str | None, rounds: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Returns a record of this format.

    The image placeholder directly precedes the first question, without a line break, as in the files of Safety Mirage.
    """
    conversations = []
    for number, (question, answer) in enumerate(rounds):
        placeholder = IMAGE_PLACEHOLDER if image is not None and number == 0 else ""
        conversations += [{"from": "human", "value": placeholder + question}, {"from": "gpt", "value": answer}]
    return {"id": id, **({} if image is None else {"image": image}), "conversations": conversations}


def validate_no_embedded_image(example: Example) -> None:
    """Raises an error if the image of an example is stored inside a table, because a file cannot reference it."""
    if example.source == "embedded":
        raise UserError(
            "the image is stored inside the table. Unpack it with `data import files`.",
            code="unsupported-setting",
            record=quoted(example.id),
        )


def write_record(example: Example) -> dict[str, Any]:
    """Returns an example as a record of this format.

    Raises:
        UserError: The image of the example is stored inside a table, or the example has a system message.
    """
    validate_no_embedded_image(example)
    if example.system is not None:
        problem = "the conversation has a system message, for which LLaVA's format has no place. Remove it."
        raise UserError(problem, code="unsupported-setting", record=quoted(example.id))
    rounds = [(turn.question, turn.answer) for turn in example.history]
    return record(example.id, example.image, [*rounds, (example.question, example.answer)])


@register("llava")
class LLaVA(Format):
    """Conversations in LLaVA's layout. They have no sets."""

    identifying_keys = ("conversations",)

    def entries(self, path: Path, images: Path | None, problems: Problems | None = None) -> Iterator[Entry]:
        for conversation in read_llava(path, images, problems):
            yield Entry(conversation, "", None)
