"""The samples that lmms-eval writes with ``--log_samples``: ``DATE_samples_TASK.jsonl``.

A line is ``{"doc_id", "input", "resps", "filtered_resps", "target", "input_media", ...}``. ``input`` is the text of the
prompt. ``resps`` is left out if it equals ``filtered_resps``. A single response is a text, and several are a list of
texts or of lists. Files of earlier versions have ``arguments`` and ``doc`` instead of ``input``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlm_unlearn.data.answer_formats.base import AnswerFormat, ForeignAnswer, optional_number, register
from vlm_unlearn.data.formats.fields import RawRecord, read_objects

MAX_DEPTH = 4  # of nested lists


@register("lmms_eval")
class LmmsEval(AnswerFormat):
    """The files of lmms-eval's ``--log_samples``. The text of the question identifies the prompt."""

    def answers(self, path: Path) -> Iterator[ForeignAnswer]:
        for record in read_objects(path, "doc_id", nan_as_null=True):
            yield from _answers(record)


def _answers(record: RawRecord) -> Iterator[ForeignAnswer]:
    field = "resps" if record.value.get("resps") is not None else "filtered_resps"
    texts = list(_texts(record.value.get(field)))
    if not texts:
        raise record.error(
            "contains no text. Pass a file DATE_samples_TASK.jsonl of a task that generates text.",
            "missing-field",
            field,
        )

    def position() -> str:
        return str(record.position)

    question, image, number = _question(record), _image(record.value), optional_number(record, "doc_id")
    for text in texts:
        checked = RawRecord({field: text}, record.file, position).text(field, empty=True)
        yield ForeignAnswer(position, checked, question=question, image=image, number=number)


def _question(record: RawRecord) -> str:
    """Returns the text of a prompt.

    Raises:
        UserError: The record contains none.
    """
    document = record.value.get("doc")
    sources = (record.value.get("input"), record.value.get("arguments"))
    question = next((text for source in sources for text in _texts(source)), None)
    if question is None and isinstance(document, dict):
        question = next((text for text in _texts(document.get("question"))), None)
    if question is None:
        raise record.error("the record contains no question, under input, arguments or doc", "missing-field", "input")
    return RawRecord({"input": question}, record.file, lambda: str(record.position)).text("input")


def _image(value: dict[str, Any]) -> str | None:
    """Returns the name of the image, or None if there is none, several, or only the picture itself."""
    names = [name for name in _texts(value.get("input_media")) if not name.startswith("data:")]
    document = value.get("doc")
    if not names and isinstance(document, dict):
        names = [name for key in ("image_path", "image") for name in _texts(document.get(key))][:1]
    return names[0] if len(names) == 1 else None


def _texts(value: Any, depth: int = 0) -> Iterator[str]:
    """Yields the texts in nested lists, in order."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list) and depth < MAX_DEPTH:
        for item in value:
            yield from _texts(item, depth + 1)
