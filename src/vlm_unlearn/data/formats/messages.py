"""Chat messages in rows of training and evaluation data, as in TRL and LLaMA-Factory.

A record has ``messages``, a list of ``{"role": "system" | "user" | "assistant", "content"}``. The content is text, in
which ``<image>`` is the place of the image, or a list of parts ``{"type": "image"}`` and ``{"type": "text", "text"}``.
The sharegpt form ``conversations``, a list of ``{"from": "system" | "human" | "gpt", "value"}``, is read too. The image
is in the part, or in the column ``images`` or ``image`` of the record.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from vlm_unlearn.data.formats.fields import RawRecord, json_type
from vlm_unlearn.data.formats.llava import IMAGE_PLACEHOLDER
from vlm_unlearn.errors import printable, quoted
from vlm_unlearn.records import Round

FIELDS = ("messages", "conversations")
Path = tuple[str | int, ...]  # the keys from a record to one of its values
_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}


class Chat(NamedTuple):
    """The content of a list of messages, without image placeholders."""

    system: str | None
    history: tuple[Round, ...]  # the earlier rounds; the image belongs to the first one
    question: str  # the last one
    answer: str | None  # None if the last message is the user's
    image: Path | None  # the keys of the image, from the record
    image_offset: int  # the number of characters of the first question before the image


class _Content(NamedTuple):
    text: str
    images: int
    image_offset: int
    image_key: int | None  # the number of the part that contains an image


def has_messages(row: Mapping[str, Any]) -> bool:
    """Returns whether a row contains messages."""
    return any(row.get(name) is not None for name in FIELDS)


def parse(record: RawRecord, answered: bool = True) -> Chat:
    """Parses the messages of a record.

    Args:
        record: The record.
        answered: Whether the last message must be an answer. If not, it can also be the user's question.

    Raises:
        UserError: A message is broken or empty, the messages do not alternate between user and assistant or do not end
            as `answered` requires, there are several images, or an image is missing or outside the first user message.
    """
    field = next(name for name in FIELDS if record.value.get(name) is not None)
    messages = record.objects(field)
    roles = [_ROLES.get(_role(message)) for message in messages]
    start = int(roles[:1] == ["system"])
    _validate_roles(record, field, messages, roles[start:], answered)
    system = (_parse_content(messages[0]).text.strip() or None) if start else None
    contents = [_parse_content(message) for message in messages[start:]]
    for number, (message, content) in enumerate(zip(messages[start:], contents, strict=True)):
        key = _content_key(message)
        if content.images and number % 2:
            raise message.error("an answer cannot contain an image", "placeholder-in-text", key)
        if content.images > 1 or (content.images and number):
            problem = "a conversation has at most one image, in its first user message"
            raise message.error(problem, "unsupported-setting", key)
        if not content.text.strip():
            raise message.error("the text is empty", "empty-field", key)
    image = contents[0]
    image_path = image_column(record)
    if image.image_key is not None:
        if image_path is not None:
            problem = "both a message and a column of the row contain an image. Pass one of them."
            raise record.error(problem, "conflicting-settings", str(image_path[0]))
        image_path = (field, start, _content_key(messages[start]), image.image_key, "image")
    if image.images and image_path is None:
        raise record.error("a message contains an image, but the row has none", "missing-field", "images")
    texts = [content.text for content in contents]
    answer = None if len(texts) % 2 else texts.pop()
    question = texts.pop()
    rounds = zip(texts[::2], texts[1::2], strict=True)
    history = tuple(Round(question=earlier, answer=reply) for earlier, reply in rounds)
    return Chat(system or record.optional_text("system"), history, question, answer, image_path, image.image_offset)


def history_column(record: RawRecord) -> tuple[Round, ...]:
    """Returns the earlier rounds of a record without messages, from its column ``history``."""
    if record.value.get("history") is None:
        return ()
    return tuple(
        Round(question=item.text("question"), answer=item.text("answer")) for item in record.objects("history")
    )


def image_column(record: RawRecord) -> Path | None:
    """Returns the keys of the image in the column ``image`` or ``images``, or None if the record has no image.

    Raises:
        UserError: Both columns are set, or there are several images.
    """
    image, images = record.value.get("image"), record.value.get("images")
    if image is not None and images is not None:
        raise record.error("the row has both image and images. Pass one of them.", "conflicting-settings", "images")
    for name, value in (("image", image), ("images", images)):
        if isinstance(value, list | tuple):
            if len(value) > 1:
                problem = f"the row has {len(value)} images. A row has at most one."
                raise record.error(problem, "unsupported-setting", name)
            return (name, 0) if value and value[0] is not None else None
        if value is not None:
            return (name,)
    return None


def path_text(path: Path) -> str:
    """Returns keys as text, such as ``messages[0].content[1].image``."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)[1:]


def _validate_roles(
    record: RawRecord, field: str, messages: list[RawRecord], roles: list[str | None], answered: bool
) -> None:
    """Raises an error if the messages after an optional system message do not alternate between user and assistant."""
    alternating = roles == [("user", "assistant")[number % 2] for number in range(len(roles))]
    if roles and alternating and not (answered and len(roles) % 2):
        return
    names = printable(", ".join(_role(message) for message in messages[:8]))
    end = " The last message is the assistant's." if answered else ""
    raise record.error(
        f"must be user and assistant messages in alternation, after an optional system message.{end} "
        f"Found: {names or 'no messages'}",
        "invalid-field",
        field,
    )


def _role(message: RawRecord) -> str:
    return message.text("role", "from")


def _content_key(message: RawRecord) -> str:
    return "content" if "content" in message.value else "value"


def _parse_content(message: RawRecord) -> _Content:
    key = _content_key(message)
    if not isinstance(message.value.get(key), list | tuple):
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
