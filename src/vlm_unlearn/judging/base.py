"""What a judge is, and grading a whole file with one."""

from __future__ import annotations

import inspect
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlm_unlearn.data.images import resolve_image
from vlm_unlearn.judging import degenerate
from vlm_unlearn.records import Label, Prompt, Response, Verdict
from vlm_unlearn.store import RecordLog, digest_file, read_records, write_records

OnVerdict = Callable[[Verdict], None]
FLUSH = 256  # verdicts that are written at once, at most
FLUSH_SECONDS = 1.0


@dataclass(frozen=True)
class Answer:
    """A response with what it answers."""

    prompt: Prompt
    response: Response
    root: Path | None = None  # of its prompt's image
    first_question: str | None = None  # of its group's first shot, which Safety Mirage's judge is shown for every shot

    def image(self) -> Path | None:
        """The image's file, looked for only by a judge that shows it.

        Raises:
            UserError: it is gone, or outside its root.
        """
        if self.prompt.image is None or self.root is None:
            return None
        return resolve_image(self.root, self.prompt.image, f'prompt "{self.prompt.id}"')


class Judge(ABC):
    """Grades answers. `name` names its verdicts' file; `labels` are those that it can tell apart, none where it gives scores only."""

    name: str
    labels: tuple[Label, ...]

    def identity(self) -> Mapping[str, object]:
        """What decides its verdicts: a changed list, rule or rubric makes a new judge."""
        code = digest_file(Path(inspect.getfile(type(self))))
        return {"judge": self.name, "code": code, "degenerate": digest_file(Path(degenerate.__file__))}

    @abstractmethod
    def grade_all(self, answers: Iterable[Answer], on_verdict: OnVerdict) -> None:
        """Calls `on_verdict` once for each answer, in any order."""

    def check_available(self) -> None:  # noqa: B027  most judges ask nobody
        """Looks whether it could grade, before there is anything to grade.

        Raises:
            UserError, RunError: it couldn't.
        """

    def failed(self, answer: Answer, error: str, raw: str | None = None) -> Verdict:
        """A verdict that says only why there is none."""
        response = answer.response
        return Verdict(prompt_id=response.prompt_id, sample=response.sample, judge=self.name, raw=raw, error=error)


class OfflineJudge(Judge):
    """Grades each answer on its own, at once."""

    @abstractmethod
    def grade(self, prompt: Prompt, text: str) -> Verdict:
        """The verdict on an answer that is there."""

    def verdict(self, answer: Answer) -> Verdict:
        """The verdict on a response; one without text gets a verdict that failed."""
        response = answer.response
        if response.text is None:
            return self.failed(answer, response.error or "no answer")
        return self.grade(answer.prompt, response.text).model_copy(update={"sample": response.sample})

    def grade_all(self, answers: Iterable[Answer], on_verdict: OnVerdict) -> None:
        for answer in answers:
            on_verdict(self.verdict(answer))


def judge_file(
    judge: Judge, answers: Sequence[Answer], file: Path, on_done: Callable[[int], None] | None = None
) -> None:
    """Appends one Verdict an answer to `file`; what is graded there already is passed over, what failed there is tried again.

    Args:
        answers: gone through twice.
        on_done: called with how many answers have a verdict.
    """
    log = RecordLog(file, Verdict)
    _drop_failures(log, answers)
    pending: list[Verdict] = []
    flushed = time.monotonic()

    def flush() -> None:
        nonlocal flushed
        log.append(pending)
        pending.clear()
        flushed = time.monotonic()
        if on_done:
            on_done(len(log.keys))

    def take(verdict: Verdict) -> None:
        pending.append(verdict)
        if len(pending) >= FLUSH or time.monotonic() - flushed > FLUSH_SECONDS:
            flush()

    def waiting() -> Iterator[Answer]:
        return (answer for answer in answers if answer.response.key not in log.keys)

    try:
        judge.grade_all(waiting(), take)
    finally:
        flush()


def _drop_failures(log: RecordLog, answers: Sequence[Answer]) -> None:
    """Takes out the verdicts that no judge gave, of answers that are there: a server that was down may be up now. And doubles, which two
    processes of an older version could leave."""
    if not log.keys:
        return
    there = {answer.response.key for answer in answers if answer.response.text is not None}
    kept: dict[tuple[str, int], Verdict] = {}
    lines = 0
    for verdict in read_records(log.path, Verdict):
        lines += 1
        if not (verdict.key in there and verdict.error is not None and verdict.raw is None):
            kept.setdefault(verdict.key, verdict)
    if len(kept) < lines:
        write_records(log.path, kept.values())
        log.keys = set(kept)
