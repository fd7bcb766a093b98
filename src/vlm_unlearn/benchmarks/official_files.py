"""Readers for the common parts of official benchmark files. Errors name the file, the record and the field."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlm_unlearn.benchmarks.base import AnswersNotPublicError, QuestionScore
from vlm_unlearn.data.formats.fields import RawRecord
from vlm_unlearn.errors import UserError, quoted
from vlm_unlearn.metrics.answer_reading import read_short_answer

# LLaVA-1.5's format prompts (arXiv 2310.03744).
SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."


def record(file: Path, id: object, value: object) -> RawRecord:
    """Returns an entry of a file for typed access to its fields.

    Args:
        file: The official file.
        id: The id of the entry, for error messages.
        value: The JSON value of the entry.

    Raises:
        UserError: The value is not an object.
    """
    return RawRecord(value, file, lambda: quoted(id))


def text_list(entry: RawRecord, name: str) -> list[str]:
    """Returns a field's list of texts.

    Raises:
        UserError: The field is not a list of texts, or a text has characters that no tokenizer can read.
    """
    items = entry.value.get(name)
    if not isinstance(items, list):
        raise entry.error("must be a list of texts", "invalid-field", name)
    position = entry.position or ""
    return [RawRecord({name: item}, entry.file, lambda: position).text(name, empty=True) for item in items]


def entries(value: Any, file: Path, *keys: str) -> list[Mapping[str, Any]]:
    """Returns a list of objects that all have certain keys.

    Args:
        value: The JSON value of the list.
        file: The official file, for error messages.
        keys: The keys.

    Raises:
        UserError: The value is not a list of objects, or an object lacks a key.
    """
    if not isinstance(value, list) or not value:
        raise UserError("expected a list of objects", code="invalid-field", file=file)
    for number, entry in enumerate(value, start=1):
        for key in keys:
            if not isinstance(entry, dict) or key not in entry:
                raise UserError("the field is missing", code="missing-field", file=file, record=number, field=key)
    return value


def entries_by_id(values: Sequence[Mapping[str, Any]], file: Path, key: str) -> dict[str, Mapping[str, Any]]:
    """Returns objects by id.

    Args:
        values: The objects, which all have the key.
        file: The official file, for error messages.
        key: The key of the id.

    Raises:
        UserError: Two objects have the same id.
    """
    by_id: dict[str, Mapping[str, Any]] = {}
    for number, value in enumerate(values, start=1):
        id = str(value[key])
        if id in by_id:
            raise UserError(
                f"an earlier record has the same {key}, {quoted(id)}. Give every question an id.",
                code="duplicate-id",
                file=file,
                record=number,
                field=key,
            )
        by_id[id] = value
    return by_id


def require_answers(questions: Sequence[Mapping[str, Any]], file: Path, key: str) -> None:
    """Raises an error if no question has an answer.

    Args:
        questions: The questions.
        file: The official file, for error messages.
        key: The key of the answer.

    Raises:
        AnswersNotPublicError: No question has the key.
    """
    if not any(key in question for question in questions):
        raise answers_not_public(file)


def answers_not_public(file: Path) -> AnswersNotPublicError:
    """Returns the error for a file that contains questions only."""
    return AnswersNotPublicError(
        "the file has no answers, because they are not public. "
        "`vlm-unlearn benchmark run` writes predictions for the official server to score.",
        code="answers-not-public",
        file=file,
    )


def annotator_answers(entry: RawRecord) -> list[str]:
    """Returns the answers of all annotators, which are texts or objects with ``answer``.

    Raises:
        UserError: There are no answers, or they are not texts.
    """
    items = entry.value.get("answers")
    if not isinstance(items, list) or not items:
        raise entry.error("must be a list of texts", "invalid-field", "answers")
    answers = []
    for item in items:
        answer = item.get("answer") if isinstance(item, dict) else item
        if not isinstance(answer, str):
            raise entry.error("must be a list of texts", "invalid-field", "answers")
        answers.append(answer)
    return answers


def most_common_answer(answers: Sequence[str]) -> str:
    """Returns the most frequent answer. Of equally frequent ones, it returns the one that comes first."""
    return max(answers, key=list(answers).count)


def annotated_questions(value: Any, file: Path, key: str) -> dict[str, Any]:
    """Reads the annotations of VQAv2 and TextVQA, ``{key: [{"question_id", "image_id", "answers", ...}]}``.

    Returns:
        For each question id, an object with ``answers``, ``image`` and ``type``.

    Raises:
        UserError: The value has another layout.
    """
    if not isinstance(value, dict) or key not in value:
        raise UserError(
            f'expected {{"{key}": [...]}}. Pass the official annotation file.', code="invalid-field", file=file
        )
    questions = entries_by_id(entries(value[key], file, "question_id", "answers"), file, "question_id")
    return {
        id: {
            "answers": annotator_answers(record(file, id, entry)),
            "image": str(entry.get("image_id", id)),
            "type": str(entry.get("answer_type", "")),
            "question": entry.get("question"),
        }
        for id, entry in questions.items()
    }


def question_objects(value: Any, file: Path) -> dict[str, Any]:
    """Returns a non-empty JSON object that maps question ids to questions.

    Raises:
        UserError: The value has another layout.
    """
    if not isinstance(value, dict) or not value:
        raise UserError(
            "expected an object that maps ids to questions. Pass the official annotation file.",
            code="invalid-field",
            file=file,
        )
    return value


def short_answer_score(text: str, official: bool, score: Callable[[str], QuestionScore]) -> QuestionScore:
    """Scores a short answer after `read_short_answer` has removed its decoration.

    Args:
        text: The answer.
        official: Score the text as it is, as published evaluators do.
        score: Returns the score of a text.

    Returns:
        The score. It is 0 and unparsed if the text contains no answer.
    """
    answer = text if official else read_short_answer(text)
    return score(answer) if answer is not None else replace(score(""), value=0.0, unparsed=True)
