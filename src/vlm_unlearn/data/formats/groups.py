"""Prompts of formats whose records of one id are shots of one question."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from vlm_unlearn.records import Kind, Prompt

Asked = tuple[str, str | None, str, str | None, str | None]  # record id, image, question, reference, category


def prompts_of_groups(records: Iterable[Asked], set_name: str, kind: Kind) -> Iterator[Prompt]:
    """A prompt a record, in order; those of one id are a group, and count up in `shot`."""
    shots: Counter[str] = Counter()
    for id, image, question, reference, category in records:
        yield Prompt(
            id=f"{set_name}/{id}/{shots[id]}",
            group_id=id,
            shot=shots[id],
            set=set_name,
            kind=kind,
            image=image,
            question=question,
            reference=reference,
            category=category,
        )
        shots[id] += 1
