"""Chat messages, as in TRL and LLaMA-Factory.

A record has ``messages``, a list of ``{"role": "system" | "user" | "assistant", "content"}``. The content is text, in
which ``<image>`` is the place of the image, or a list of parts ``{"type": "image"}`` and ``{"type": "text", "text"}``.
The sharegpt form ``conversations``, a list of ``{"from": "system" | "human" | "gpt", "value"}``, is read too.
"""

from __future__ import annotations

from typing import NamedTuple

from vlm_unlearn.data.formats.fields import RawRecord, json_type
from vlm_unlearn.data.formats.llava import IMAGE_PLACEHOLDER
from vlm_unlearn.errors import printable, quoted

FIELDS = ("messages", "conversations")
_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}


class Chat(NamedTuple):
    """The content of a list of messages, without image placeholders."""

    system: str | None
    rounds: list[tuple[str, str]]  # question and answer
    has_image: bool  # whether a message contains the place of an image
    image_offset: int  # the number of characters of the first question before the image
    image_path: tuple[str | int, ...] | None  # the keys of an image that a part contains, from the record


class _Content(NamedTuple):
    text: str
    images: int
    image_offset: int
    image_key: int | None  # the number of the part that contains an image


def parse(record: RawRecord) -> Chat:
    """Parses the messages of a record.

    Raises:
        UserError: A message is broken or empty, the messages do not alternate between user and assistant or do not end
            with an answer, or there are several images or one outside the first user message.
    """
    field = next(name for name in FIELDS if record.value.get(name) is not None)
    messages = record.objects(field)
    roles = [_ROLES.get(_role(message)) for message in messages]
    system = None
    start = int(roles[:1] == ["system"])
    if start:
        system = _parse_content(messages[0]).text.strip() or None
    if len(roles) == start or roles[start:] != ["user", "assistant"] * ((len(roles) - start) // 2):
        names = printable(", ".join(_role(message) for message in messages[:8]))
        raise record.error(
            "must be user and assistant messages in alternation, after an optional system message. The last message "
            f"is the assistant's. Found: {names or 'no messages'}",
            "invalid-field",
            field,
        )
    rounds = []
    image = _Content("", 0, 0, None)
    for number in range(start, len(messages), 2):
        user, assistant = messages[number], messages[number + 1]
        question, answer = _parse_content(user), _parse_content(assistant)
        if answer.images:
            raise assistant.error("an answer cannot contain an image", "placeholder-in-text", _content_key(assistant))
        if number == start:
            image = question
        if question.images > 1 or (question.images and number != start):
            raise user.error(
                "an example has at most one image, in its first user message", "unsupported-setting", _content_key(user)
            )
        for message, content in ((user, question), (assistant, answer)):
            if not content.text.strip():
                raise message.error("the text is empty", "empty-field", _content_key(message))
        rounds.append((question.text, answer.text))
    key = _content_key(messages[start])
    image_path = None if image.image_key is None else (field, start, key, image.image_key, "image")
    return Chat(system, rounds, image.images > 0, image.image_offset, image_path)


def _role(message: RawRecord) -> str:
    return message.text("role", "from")


def _content_key(message: RawRecord) -> str:
    return "content" if "content" in message.value else "value"


def _parse_content(message: RawRecord) -> _Content:
    key = _content_key(message)
    if not isinstance(message.value.get(key), list):
        return _split_placeholders(message.text(key, empty=True))
    text, images, image_offset, image_key = "", 0, 0, None
    for number, part in enumerate(message.objects(key)):
        match part.value.get("type"):
            case "text":
                text += part.text("text", empty=True)
            case "image":
                images += 1
                image_offset = len(text)
                if part.value.get("image") is not None:
                    image_key = number
            case other:
                part_type = quoted(other) if isinstance(other, str) else json_type(other)
                raise part.error(f'must be "image" or "text", found {part_type}', "unsupported-setting", "type")
    return _Content(text, images, image_offset, image_key)


def _split_placeholders(value: str) -> _Content:
    """Removes image placeholders from a text, and the white space between a placeholder and the start or end."""
    prefix, *others = value.split(IMAGE_PLACEHOLDER)
    if not others:
        return _Content(value, 0, 0, None)
    suffix = "".join(others)
    prefix, suffix = (prefix, suffix.rstrip()) if prefix.strip() else ("", suffix.strip())
    if not suffix:
        prefix = prefix.rstrip()
    return _Content(prefix + suffix, len(others), len(prefix), None)
