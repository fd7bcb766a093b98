"""What a judge is, and grading a whole file with one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Protocol

from vlm_unlearn.records import Prompt, Response, Verdict
from vlm_unlearn.store import RecordLog


class Judge(Protocol):
    """Grades one answer."""

    name: str

    def grade(self, prompt: Prompt, text: str) -> Verdict:
        """The verdict on an answer that is there."""


def judge_file(
    judge: Judge,
    prompts: Mapping[str, Prompt],
    responses: Iterable[Response],
    file: Path,
    batch_size: int = 256,
    on_done: Callable[[int], None] | None = None,
) -> None:
    """Appends one Verdict a response to `file`; what is graded there already is passed over.

    A response without text gets a verdict without label, which counts as failed.
    """
    log = RecordLog(file, Verdict)
    pending: list[Verdict] = []
    for done, response in enumerate(responses, start=1):
        if response.key not in log.keys:
            pending.append(grade(judge, prompts[response.prompt_id], response))
        if len(pending) >= batch_size:
            _flush(log, pending)
            if on_done:
                on_done(done)
    _flush(log, pending)


def grade(judge: Judge, prompt: Prompt, response: Response) -> Verdict:
    """The verdict on a response; one without text gets a verdict without label."""
    if response.text is None:
        return Verdict(prompt_id=response.prompt_id, sample=response.sample, judge=judge.name, error=response.error or "no answer")
    return judge.grade(prompt, response.text).model_copy(update={"sample": response.sample})


def _flush(log: RecordLog, pending: list[Verdict]) -> None:
    log.append(pending)
    pending.clear()
