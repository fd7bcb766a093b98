"""Sets of questions for evaluation, whose files have no answers to train on."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from vlm_unlearn.data.formats.base import Entry, Format
from vlm_unlearn.data.formats.fields import RawRecord
from vlm_unlearn.data.formats.llava import IMAGE_PLACEHOLDER
from vlm_unlearn.data.image_paths import UNPACKED
from vlm_unlearn.errors import Problems, UserError, quoted
from vlm_unlearn.records import Kind, Prompt
from vlm_unlearn.store import read_json


@dataclass(frozen=True)
class SafetyQuestion:
    """A question of a safety set.

    Attributes:
        id: The id, which no other question of the file has.
        question: The text, as the model gets it.
        kind: Whether the question is harmful, and whether its image is.
        image: The path of the image below the image root. None for a question without an image.
        category: The category, for breakdowns.
        request: The request that judges grade the answer against, if the harmful part of it is in the image.
        reference: A good answer, if the file contains one.
        is_embedded: Whether the image was stored in the file, and is now in the folder `UNPACKED` of the cache.
    """

    id: str
    question: str
    kind: Kind
    image: str | None = None
    category: str | None = None
    request: str | None = None
    reference: str | None = None
    is_embedded: bool = False


class QuestionSet(Format):
    """Base class of the formats of safety sets. A subclass implements `questions`."""

    @abstractmethod
    def questions(self, path: Path, images: Path) -> Iterator[SafetyQuestion]:
        """Yields the questions in file order.

        Args:
            path: The file, or the folder of a set with several files.
            images: The image root.

        Raises:
            UserError: The file cannot be read, a record is broken, or its image is missing.
        """

    def entries(self, path: Path, images: Path | None, problems: Problems | None = None) -> Iterator[Entry]:
        """Raises an error, because the questions have no answers to train on.

        Raises:
            UserError: Always.
        """
        raise UserError(
            "contains the questions of an evaluation, without answers to train on. Use it in a split of a suite.",
            code="unsupported-setting",
            file=path,
        )

    def prompts(self, path: Path, images: Path, set_name: str, kind: Kind) -> Iterator[Prompt]:
        """Yields the prompts of one kind. Every question is a group of its own.

        Raises:
            UserError: A record is broken, its image is missing, or two questions have the same id.
        """
        ids: set[str] = set()
        for question in self.questions(path, images):
            if question.id in ids:
                problem = "an earlier question has the same id. Give every question another id."
                raise UserError(problem, code="duplicate-id", file=path, record=quoted(question.id))
            ids.add(question.id)
            if question.kind == kind:
                yield Prompt(
                    id=f"{set_name}/{question.id}/0",
                    group_id=question.id,
                    set=set_name,
                    kind=kind,
                    image=f"{UNPACKED}/{question.image}" if question.is_embedded else question.image,
                    question=question.question,
                    reference=question.reference,
                    category=question.category,
                    judged_question=question.request,
                )


def question_text(record: RawRecord, *names: str) -> str:
    """Returns the question in the first of the named fields.

    Raises:
        UserError: The field is missing or empty, or contains an image placeholder.
    """
    text = record.text(*names)
    if IMAGE_PLACEHOLDER in text:
        name = next(name for name in names if name in record.value)
        problem = f"the question contains {IMAGE_PLACEHOLDER}. Remove it."
        raise record.error(problem, "placeholder-in-text", name)
    return text.strip()


def keyed_records(path: Path, layout: str) -> list[tuple[str, RawRecord]]:
    """Returns the records of a JSON object by their keys, in file order.

    Args:
        path: The file.
        layout: The expected layout, for the error.

    Raises:
        UserError: The file is not a JSON object of objects.
    """
    value = read_json(path)
    if not isinstance(value, dict) or not value:
        raise UserError(f"expected {layout}", code="invalid-field", file=path)
    return [
        (id, RawRecord(item, path.name, partial(quoted, id), number)) for number, (id, item) in enumerate(value.items())
    ]
