"""Evaluation prompts of formats in which the records with the same id are rewrites of one question."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from vlm_unlearn.errors import UserError, quoted
from vlm_unlearn.records import Kind, Prompt

AttackRecord = tuple[str, str | None, str, str | None, str | None]  # record id, image, question, reference, category


def prompts_of_groups(records: Iterable[AttackRecord], set_name: str, kind: Kind) -> Iterator[Prompt]:
    """Yields one prompt per record, in order. The records with the same id form a group, numbered in `rewrite`.

    Raises:
        UserError: Records with the same id have different images, so that they are not rewrites of one question.
    """
    rewrites: Counter[str] = Counter()
    images: dict[str, str | None] = {}
    for id, image, question, reference, category in records:
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
            question=question,
            reference=reference,
            category=category,
        )
        rewrites[id] += 1
