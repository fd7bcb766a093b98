"""Evaluation prompts of formats in which the records with the same id are rewrites of one question."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from vlm_unlearn.errors import UserError, quoted
from vlm_unlearn.records import Example, Kind, Prompt, Round


class AttackRecord(NamedTuple):
    """A question, of which a prompt is made."""

    id: str
    image: str | None
    question: str
    reference: str | None
    category: str | None
    system: str | None = None
    history: tuple[Round, ...] = ()
    image_offset: int = 0

    @classmethod
    def of_example(cls, example: Example) -> AttackRecord:
        """Returns the question of an example, with the answer as its reference."""
        return cls(
            example.id,
            example.image,
            example.question,
            example.answer or None,
            example.category,
            example.system,
            example.history,
            example.image_offset,
        )


def prompts_of_groups(records: Iterable[AttackRecord], set_name: str, kind: Kind) -> Iterator[Prompt]:
    """Yields one prompt per record, in order. The records with the same id form a group, numbered in `rewrite`.

    Raises:
        UserError: Records with the same id have different images, so that they are not rewrites of one question.
    """
    rewrites: Counter[str] = Counter()
    images: dict[str, str | None] = {}
    for record in records:
        id, image = record.id, record.image
        if images.setdefault(id, image) != image:
            raise UserError(
                f"an earlier record with the same id has another image, {quoted(images[id])} instead of "
                f"{quoted(image)}. Records with the same id are rewrites of one question. Give this one another id.",
                code="duplicate-id",
                record=quoted(id),
                field="id",
            )
        yield Prompt(
            id=f"{set_name}/{id}/{rewrites[id]}",
            group_id=id,
            rewrite=rewrites[id],
            set=set_name,
            kind=kind,
            image=image,
            question=record.question,
            reference=record.reference,
            category=record.category,
            system=record.system,
            history=record.history,
            image_offset=record.image_offset,
        )
        rewrites[id] += 1
