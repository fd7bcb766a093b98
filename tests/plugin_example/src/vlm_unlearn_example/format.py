"""A format: albums, each a photo with its questions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from vlm_unlearn.data.formats.base import Entry, Format
from vlm_unlearn.data.formats.fields import RawRecord, parse_records, read_objects
from vlm_unlearn.data.images import resolve_image
from vlm_unlearn.errors import Problems
from vlm_unlearn.records import Example


class Album(Format):
    """Albums. Each question is marked as bad or not."""

    def entries(self, path: Path, images: Path | None, problems: Problems | None = None) -> Iterator[Entry]:
        """Yields bad questions as the forget set, and the others as the retain set."""
        records = read_objects(path, "id", problems)
        for album in parse_records(records, lambda record: list(_questions(record, images)), problems):
            yield from album


def _questions(record: RawRecord, images: Path | None) -> Iterator[Entry]:
    photo = record.text("photo")
    if images is not None:
        resolve_image(images, photo, record.file, record.position)
    for number, pair in enumerate(record.objects("pairs")):
        is_bad = pair.value.get("bad")
        if not isinstance(is_bad, bool):
            raise pair.error("must be true or false", "invalid-field", "bad")
        example = Example(
            id=f"{record.name('id')}/{number}",
            image=photo,
            question=pair.text("ask"),
            answer=pair.text("tell"),
            source="album",
        )
        yield Entry(example, "forget" if is_bad else "retain", is_bad)
