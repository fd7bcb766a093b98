"""LLaVA's conversation format: ``{"id", "image", "conversations": [{"from": "human", "value"}, {"from": "gpt", "value"}, ...]}``.

``<image>`` may stand anywhere in a human turn. As in LLaVA's own training the image comes first, so that the mark's place
within the text does not matter here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from vlm_unlearn.data.formats.fields import RawRecord, parsed, read_objects
from vlm_unlearn.data.images import resolve_image
from vlm_unlearn.errors import Problems, UserError, quoted
from vlm_unlearn.records import Example, Round

IMAGE_MARK = "<image>"
_ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}


class Conversation(NamedTuple):
    """A record's image and its rounds of question and answer, image marks taken out."""

    id: str
    image: str | None
    rounds: list[tuple[str, str]]


def parse(record: RawRecord, empty_answers: bool = False) -> Conversation:
    """One record.

    Args:
        empty_answers: take a gpt turn that says nothing: there is nothing to train on, but files are passed on as they are.

    Raises:
        UserError: a field is missing, the turns don't alternate, a turn says nothing, or marks and images don't match.
    """
    turns = record.objects("conversations")
    roles = [_ROLES.get(turn.text("from")) for turn in turns]
    if not turns or roles != ["human", "gpt"] * (len(turns) // 2):
        raise UserError(
            f'{record.where}: "conversations" must be human and gpt turns in alternation, human first, gpt last'
        )
    image = record.text("image") if record.value.get("image") not in (None, "") else None
    rounds = []
    marks = 0
    for asked, answered in zip(turns[::2], turns[1::2], strict=True):
        value = asked.text("value")
        marks += value.count(IMAGE_MARK)
        question = value.replace(IMAGE_MARK, "").strip()
        if not question:
            raise UserError(f"{asked.where}: asks nothing")
        answer = answered.text("value", empty=empty_answers)
        if IMAGE_MARK in answer:
            raise UserError(f"{answered.where}: an answer holds {IMAGE_MARK}; take it out")
        rounds.append((question, answer))
    if marks > 1:
        raise UserError(f"{record.where}: {marks} {IMAGE_MARK} marks; a record has one image")
    if marks and image is None:
        raise UserError(f'{record.where}: an {IMAGE_MARK} mark, but "image" is missing')
    name = record.name("id") if record.value.get("id") is not None else ""
    return Conversation(name, image, rounds)


def read_llava(path: Path, images: Path | None, problems: Problems | None = None) -> Iterator[Example]:
    """Conversations as examples, one at a time: the last round asked and answered, the rounds before as its history.

    Args:
        images: the image root; None leaves the files unlooked-at.
        problems: takes broken records; without it the first one raises.

    Raises:
        UserError: a broken file; a broken record or a missing image where `problems` is None.
    """

    def read(record: RawRecord) -> Example:
        conversation = parse(record)
        if conversation.image is not None and images is not None:
            resolve_image(images, conversation.image, record.where)
        return example(conversation, record.number)

    return parsed(read_objects(path, "id", problems), read, problems)


def example(conversation: Conversation, number: int) -> Example:
    """The last round as an example, the others as its history; a record without an id goes by its number."""
    *before, (question, answer) = conversation.rounds
    return Example(
        id=conversation.id or str(number),
        image=conversation.image,
        question=question,
        answer=answer,
        history=tuple(Round(question=asked, answer=answered) for asked, answered in before),
        source="llava",
    )


def is_complete(value: object, plain: bool) -> bool:
    """Whether a JSON value is surely a conversation that `parse` takes: quick, and never True for one that it refuses.

    A False only says that it takes `parse` to tell.

    Args:
        plain: all texts in it are ASCII without NUL.
    """
    if not plain:
        return False
    turns = value.get("conversations") if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(turns, list) or not turns or len(turns) % 2:
        return False
    marks = 0
    for place, turn in enumerate(turns):
        if not isinstance(turn, dict) or turn.get("from") != ("gpt" if place % 2 else "human"):
            return False
        text = turn.get("value")
        if not isinstance(text, str) or not text or text.isspace():
            return False
        if IMAGE_MARK in text:
            marks += 1
            if place % 2 or text.count(IMAGE_MARK) > 1 or not text.replace(IMAGE_MARK, "").strip():
                return False
    image = value.get("image")
    name = value.get("id", "none")
    if not isinstance(name, str) or not name.strip():
        return False
    return marks == 0 if image is None else marks <= 1 and isinstance(image, str) and bool(image.strip())


def record(id: str | int, image: str | None, rounds: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """A record of this format, the image mark before the first question, without a line break (as Safety Mirage's files have it)."""
    conversations = []
    for number, (question, answer) in enumerate(rounds):
        mark = IMAGE_MARK if image is not None and number == 0 else ""
        conversations += [{"from": "human", "value": mark + question}, {"from": "gpt", "value": answer}]
    return {"id": id, **({} if image is None else {"image": image}), "conversations": conversations}


def validate_no_embedded_image(example: Example) -> None:
    """Raises for an example whose image is inside a table: no file can name it."""
    if example.source == "embedded":
        raise UserError(f"{quoted(example.id)}: its image is inside the table; `data import files` unpacks it")


def write_record(example: Example) -> dict[str, Any]:
    """An example as a record of this format."""
    rounds = [(turn.question, turn.answer) for turn in example.history]
    validate_no_embedded_image(example)
    return record(example.id, example.image, [*rounds, (example.question, example.answer)])
