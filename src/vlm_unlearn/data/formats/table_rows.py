"""Rows of tables: a question and an answer in columns, or chat messages as in TRL."""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_unlearn.data.formats import messages
from vlm_unlearn.data.formats.fields import RawRecord
from vlm_unlearn.data.formats.llava import IMAGE_PLACEHOLDER
from vlm_unlearn.data.image_paths import resolve_image
from vlm_unlearn.data.rows import value_at
from vlm_unlearn.errors import nearest, quoted
from vlm_unlearn.records import Example


@dataclass(frozen=True)
class Columns:
    """The names of a table's columns.

    A table must have the columns `question` and `answer`, or messages, and the columns of the fields in `required`.

    Attributes:
        question: The question.
        answer: The answer.
        image: The path of the image below the image root. In a table without this column it is ``images``.
        id: The id of the row. Without it the number of the row is used.
        category: The category of the question.
        pair: The id that ties a decouple or preferred row to its forget row.
        set: The set of the row: forget, retain, decouple or preferred.
        required: The fields of this class whose columns must exist, because the user named them.
    """

    question: str = "question"
    answer: str = "answer"
    image: str = "image"
    id: str = "id"
    category: str = "category"
    pair: str = "pair_id"
    set: str = "set"
    required: frozenset[str] = frozenset()


SETS = {
    **dict.fromkeys(("forget", "harmful", "unsafe"), "forget"),
    **dict.fromkeys(("retain", "harmless", "safe"), "retain"),
    "decouple": "decouple",
    "preferred": "preferred",
}


@dataclass(frozen=True)
class Row:
    """A row as an example, with the set in its set column.

    Attributes:
        example: The example. The answer is empty in a row of messages that ends with a question.
        set: The set, or None if the row has none.
        is_chat: Whether the row contains messages.
    """

    example: Example
    set: str | None
    is_chat: bool = False


def is_chat(record: RawRecord, columns: Columns) -> bool:
    """Returns whether a row contains messages instead of a question in a column."""
    return record.value.get(columns.question) is None and messages.has_messages(record.value)


def read_row(
    record: RawRecord, columns: Columns, images: Path | None, embedded: Path | None, answered: bool = True
) -> Row:
    """Returns a row as an example.

    Args:
        record: The row.
        columns: The names of the columns. A row of messages has `messages.FIELDS` and ``images`` instead.
        images: The image root. None skips the check of the image file.
        embedded: The folder for an image that is stored in the row.
        answered: Whether messages must end with an answer.

    Raises:
        UserError: The row is broken, or its image is missing.
    """
    if is_chat(record, columns):
        return _chat_row(record, columns, images, embedded, answered)
    column = columns.image
    if column not in record.value and "image" not in columns.required:
        column = "images"  # as in TRL
    image, source = row_image(record, record.value.get(column), column, images, embedded)
    question = cell_text(record, columns.question)
    if IMAGE_PLACEHOLDER in question:  # as in LLaVA's files
        if image is None:
            raise record.error(
                f"the question contains {IMAGE_PLACEHOLDER}, but the row has no image",
                "placeholder-in-text",
                columns.question,
            )
        question = question.replace(IMAGE_PLACEHOLDER, "").strip()
    answer = cell_text(record, columns.answer)
    if not question:
        raise record.error("the question is empty", "empty-field", columns.question)
    if IMAGE_PLACEHOLDER in answer:
        problem = f"the answer contains {IMAGE_PLACEHOLDER}. Remove it."
        raise record.error(problem, "placeholder-in-text", columns.answer)
    return Row(
        Example(
            id=_optional(record, columns.id) or str(record.number),
            image=image,
            question=question,
            answer=answer,
            category=_optional(record, columns.category),
            pair_id=_optional(record, columns.pair),
            source=source,
        ),
        set_of(record, columns),
    )


def _chat_row(record: RawRecord, columns: Columns, images: Path | None, embedded: Path | None, answered: bool) -> Row:
    if columns.image != "image" and record.value.get(columns.image) is not None:
        renamed = {**record.value, "image": record.value[columns.image]}
        record = RawRecord(renamed, record.file, lambda: str(record.position), record.number)
    chat = messages.parse(record, answered)
    value, field = None, "images"
    if chat.image is not None:
        value, field = value_at(record.value, chat.image), messages.path_text(chat.image)
    image, source = row_image(record, value, field, images, embedded)
    example = Example(
        id=_optional(record, columns.id) or str(record.number),
        image=image,
        question=chat.question,
        answer=chat.answer or "",
        category=_optional(record, columns.category),
        pair_id=_optional(record, columns.pair),
        source=source,
        history=chat.history,
        system=chat.system,
        image_offset=chat.image_offset,
        loss_on="last_answer" if chat.history else "all_answers",
    )
    return Row(example, set_of(record, columns), is_chat=True)


def set_of(record: RawRecord, columns: Columns) -> str | None:
    """Returns the set of a row: forget, retain, decouple or preferred. None for a table without a set column.

    Raises:
        UserError: The set column is required and contains another value. A column that is called "set" by coincidence
        can
            contain any value.
    """
    if "set" not in columns.required:
        return SETS.get(str(record.value.get(columns.set, "")).strip().lower())
    name = cell_text(record, columns.set).strip().lower()
    if name not in SETS:
        raise record.error(
            f"unknown set {quoted(name)}. Use forget, retain, decouple or preferred{nearest(name, SETS)}",
            "unknown-name",
            columns.set,
        )
    return SETS[name]


def cell_text(record: RawRecord, column: str) -> str:
    """Returns the text of a cell. A number is converted to text.

    Raises:
        UserError: The cell is missing or empty, or contains neither text nor a number.
    """
    value = record.value.get(column)
    if (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, float) and math.isfinite(value)):
        return str(value)
    return record.text(column)


def _optional(record: RawRecord, column: str) -> str | None:
    return None if record.value.get(column) in (None, "") else cell_text(record, column)


def row_image(
    record: RawRecord, image: Any, field: str, images: Path | None, embedded: Path | None
) -> tuple[str | None, str]:
    """Returns the image path of a row, and its source.

    The source is ``table`` for a path below the image root, and ``embedded`` for an image that is stored in the table.

    Args:
        record: The row.
        image: The value of the image column, or None.
        field: The name of the column, for error messages.
        images: As in `read_row`.
        embedded: As in `read_row`.
    """
    if isinstance(image, list):
        if len(image) > 1:
            raise record.error(f"{len(image)} images, but an example has at most one", "invalid-field", field)
        image = image[0] if image else None
    if isinstance(image, dict):  # an undecoded Image column of `datasets`
        if isinstance(image.get("bytes"), bytes) and image["bytes"]:
            return _write_embedded(image["bytes"], embedded), "embedded"
        image = image.get("path")
    if image is None or image == "":
        return None, "table"
    path = RawRecord({field: image}, record.file, lambda: str(record.position)).text(field)
    if images is not None:
        resolve_image(images, path, record.file, record.position)
    return path, "table"


def _write_embedded(content: bytes, image_root: Path | None) -> str:
    # The suffix does not matter: images are opened by their content.
    name = f"{hashlib.sha256(content).hexdigest()[:32]}.img"
    if image_root is not None and not (image_root / name).is_file():
        image_root.mkdir(parents=True, exist_ok=True)
        temporary = image_root / f".{name}.{os.getpid()}.part"
        temporary.write_bytes(content)
        os.replace(temporary, image_root / name)
    return name
