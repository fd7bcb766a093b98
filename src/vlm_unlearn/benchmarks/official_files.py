"""Reading official files: whatever is not as it should be is named."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_unlearn.benchmarks.base import AnswersNotPublicError
from vlm_unlearn.data.formats.fields import RawRecord
from vlm_unlearn.errors import UserError, quoted

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."


def record(file: Path, what: str, id: object, value: object) -> RawRecord:
    """An entry whose fields name the file and the entry when they are not as they should be."""
    return RawRecord(value, file, lambda: f"{what} {quoted(id)}")


def texts(value: object, where: str, name: str) -> list[str]:
    """A list of texts that a tokenizer can read.

    Raises:
        UserError: it is something else.
    """
    if not isinstance(value, list):
        raise UserError(f'{where}: "{name}" must be a list of texts')
    return [RawRecord({name: item}, where).text(name, empty=True) for item in value]


def entries(value: Any, where: str, *keys: str) -> list[Mapping[str, Any]]:
    """A list of objects that all have `keys`.

    Raises:
        UserError: it is something else; the entry and the key are named.
    """
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: expected a list of objects")
    for number, entry in enumerate(value):
        missing = [key for key in keys if not isinstance(entry, dict) or key not in entry]
        if missing:
            raise UserError(f'{where}: entry {number} has no "{missing[0]}"')
    return value


def require_answers(listed: Sequence[Mapping[str, Any]], file: Path, key: str) -> None:
    """Looks that entries have answers at all.

    Raises:
        AnswersNotPublicError: none of them has.
    """
    if not any(key in entry for entry in listed):
        raise answers_not_public(file)


def answers_not_public(file: Path) -> AnswersNotPublicError:
    """What to say of a file of questions only."""
    return AnswersNotPublicError(
        f"{file}: has no answers; they are not public: `benchmark run` writes predictions, which the official server scores"
    )


def annotator_answers(entry: Mapping[str, Any], where: str) -> list[str]:
    """The annotators' answers, given as texts or as objects with ``answer``.

    Raises:
        UserError: there are none, or they are something else.
    """
    answers: Iterable[Any] = entry["answers"] if isinstance(entry["answers"], list) else ()
    found = [answer.get("answer") if isinstance(answer, dict) else answer for answer in answers]
    if not found or not all(isinstance(answer, str) for answer in found):
        raise UserError(f'{where}: "answers" must be a list of texts')
    return [str(answer) for answer in found]


def most_common_answer(answers: Sequence[str]) -> str:
    """What most annotators say; of several, what the first of them says."""
    return max(answers, key=list(answers).count)


def annotated_questions(value: Any, annotations: Path, key: str) -> dict[str, Any]:
    """Question id -> ``answers``, ``image`` and ``type``, from ``{key: [{"question_id", "image_id", "answers", ...}]}``.

    Raises:
        AnswersNotPublicError: no question has answers.
        UserError: the value is something else.
    """
    if not isinstance(value, dict) or key not in value:
        raise UserError(f'{annotations}: expected {{"{key}": [...]}}, the official annotation file')
    return {
        str(entry["question_id"]): {
            "answers": annotator_answers(entry, f"{annotations}: question {quoted(entry['question_id'])}"),
            "image": str(entry.get("image_id", entry["question_id"])),
            "type": str(entry.get("answer_type", "")),
        }
        for entry in entries(value[key], str(annotations), "question_id", "answers")
    }
