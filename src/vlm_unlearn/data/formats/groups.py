"""Prompts of formats whose records of one id are rewrites of one question."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from vlm_unlearn.records import Kind, Prompt

AttackRecord = tuple[str, str | None, str, str | None, str | None]  # record id, image, question, reference, category


def prompts_of_groups(records: Iterable[AttackRecord], set_name: str, kind: Kind) -> Iterator[Prompt]:
    """A prompt a record, in order; those of one id are a group, and count up in `shot`."""
    rewrites: Counter[str] = Counter()
    for id, image, question, reference, category in records:
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
