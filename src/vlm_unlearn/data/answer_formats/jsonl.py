"""Answers as JSON lines, for programs without a format of their own, and the ``responses.jsonl`` of a run.

A line has one of these fields for the answer: ``text``, ``answer``, ``response`` or ``prediction``. Its prompt is
identified by ``prompt_id``, the id in the ``prompts.jsonl`` of a run, or by ``question``, ``image`` and ``id`` (the id
of the record in the data file). ``split``, ``sample``, ``finish_reason`` and ``error`` are optional.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from vlm_unlearn.data.answer_formats.base import AnswerFormat, ForeignAnswer, optional_number, register
from vlm_unlearn.data.formats.fields import RawRecord, read_objects

TEXTS = ("text", "answer", "response", "prediction")


@register("jsonl")
class JsonLines(AnswerFormat):
    """JSON lines with an answer and the id or the question of its prompt."""

    def answers(self, path: Path) -> Iterator[ForeignAnswer]:
        return map(_answer, read_objects(path, "prompt_id"))


def _answer(record: RawRecord) -> ForeignAnswer:
    value = record.value
    error = record.optional_text("error")
    field = next((name for name in TEXTS if value.get(name) is not None), None)
    if field is None and error is None:
        raise record.error(f"the field is missing. Use one of {', '.join(TEXTS)}, or error.", "missing-field", "text")
    group = None if value.get("id") is None else record.name("id")
    answer = ForeignAnswer(
        lambda: str(record.position),
        None if field is None or error is not None else record.text(field, empty=True),
        error=error,
        finish_reason=record.optional_text("finish_reason"),
        key=record.optional_text("prompt_id"),
        group=group,
        question=record.optional_text("question"),
        image=record.optional_text("image"),
        split=record.optional_text("split"),
        sample=optional_number(record, "sample"),
    )
    if answer.key is None and answer.group is None and answer.question is None:
        raise record.error(
            "nothing identifies the prompt. Add prompt_id, or question and image, or id.", "missing-field", "prompt_id"
        )
    return answer
