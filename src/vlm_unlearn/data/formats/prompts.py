"""The prompts of an earlier evaluation, its file prompts.jsonl."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from vlm_unlearn.data.formats.base import Entry, Format, register
from vlm_unlearn.data.images import resolve_image
from vlm_unlearn.errors import Problems, UserError, quoted
from vlm_unlearn.records import Kind, Prompt
from vlm_unlearn.store import read_records


@register("prompts")
class Prompts(Format):
    """The file prompts.jsonl of an evaluation. Its prompts keep their ids."""

    def entries(self, path: Path, images: Path | None, problems: Problems | None = None) -> Iterator[Entry]:
        """Raises an error, because the answers to prompts are no training examples.

        Raises:
            UserError: Always.
        """
        raise UserError("contains prompts of an evaluation, not examples", code="unsupported-setting", file=path)

    def prompts(self, path: Path, images: Path, set_name: str, kind: Kind) -> Iterator[Prompt]:
        for prompt in read_records(path, Prompt):
            if prompt.set == set_name and prompt.kind == kind:
                if prompt.image is not None:
                    resolve_image(images, prompt.image, path, quoted(prompt.id))
                yield prompt
