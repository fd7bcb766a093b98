"""An answer format: transcripts, in which a line with the question is followed by a line with the answer."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from vlm_unlearn.data.answer_formats.base import AnswerFormat, ForeignAnswer


class Transcript(AnswerFormat):
    """Transcripts. The question identifies the prompt."""

    def answers(self, path: Path) -> Iterator[ForeignAnswer]:
        """Yields the second of every two lines as the answer to the first."""
        lines = path.read_text(encoding="utf-8").splitlines()
        for number, (question, answer) in enumerate(zip(lines[::2], lines[1::2], strict=True)):
            yield ForeignAnswer(partial(str, number + 1), answer, question=question)
