"""Safety Mirage's *select harmful*: of several models' answers to an unsafe question, a judge names the most harmful one.

The chosen answers are what the forget set unlearns. What cannot be read as a choice is recorded as such and left out with a
count; ``paper=True`` takes the first answer then, as published.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vlm_unlearn.data.formats import vlguard
from vlm_unlearn.data.images import resolve_image
from vlm_unlearn.data.pipeline import read_answers
from vlm_unlearn.data.prompts import fence, template
from vlm_unlearn.errors import Problems, RunError, UserError, report_problem
from vlm_unlearn.records import Record
from vlm_unlearn.store import write_json, write_records

Outcome = Literal[
    "chosen", "only answer", "none harmful", "unreadable", "out of range", "no reply", "no answer", "image asked before"
]
# The number alone, perhaps named: a sentence about an answer may mean that it is not the one.
_NUMBER = re.compile(
    r"\W*?(?:(?:the )?(?:answer|number|choice|option)(?: is| number)?\b)?[^\w-]*(-?\d+)\W*", re.IGNORECASE
)


@dataclass(frozen=True)
class SelectionTask:
    """An unsafe question with the answers to choose from, in the order of the answer files."""

    image: str  # as the record names it: the key of the answer files
    path: Path | None
    question: str
    answers: tuple[str, ...]
    models: tuple[str, ...]  # whose answers

    def request(self) -> str:
        """The judge's prompt. The answers are fenced by a line that none of them can foresee."""
        line = fence(self.question, *self.answers)
        listed = "\n\n".join(
            f"Answer {number}:\n{line}\n{text}\n{line}" for number, text in enumerate(self.answers, start=1)
        )
        return template("select_harmful").format(
            count=len(self.answers), fence=line, question=self.question, answers=listed
        )


class Choice(Record):
    """How one question was decided; a line of ``OUT.choices.jsonl``."""

    image: str
    outcome: Outcome
    model: str | None = None  # whose answer was taken
    raw: str | None = None  # what the judge said
    error: str | None = None


def read_selection_tasks(
    source: Path, answers: Sequence[Path], images: Path | None, problems: Problems | None
) -> tuple[list[SelectionTask], Counter[str]]:
    """The unsafe questions of a VLGuard file with every answer that is there, and how many have none or an image asked before.

    Answers go by image, so that a second question on an image has no answers of its own.

    Args:
        answers: a JSON file ``image -> answer`` a model; a file's name without its ending is the model's.

    Raises:
        UserError: a file is broken, or no answer is to an unsafe image of the file.
    """
    by_model = {path.stem: read_answers(path) for path in answers}
    if len(by_model) < len(answers):
        raise UserError("two answer files have the same name; their names tell the models apart")
    found: dict[str, SelectionTask] = {}
    left_out: Counter[str] = Counter()
    for raw, pairs in vlguard.read_records(source, None, problems):
        pair = pairs[0]
        if pair.kind != "unsafe":
            continue
        if pair.image in found:
            left_out["image asked before"] += 1
            continue
        given = {model: known[pair.image] for model, known in by_model.items() if known.get(pair.image, "").strip()}
        if not given:
            left_out["no answer"] += 1
            continue
        try:
            path = None if images is None else resolve_image(images, pair.image, raw.file, raw.position)
        except UserError as error:
            report_problem(error, problems)
            continue
        found[pair.image] = SelectionTask(pair.image, path, pair.question, tuple(given.values()), tuple(given))
    if not found:
        raise UserError(f"{answers[0]}: names no image of an unsafe record of {source}")
    return list(found.values()), left_out


def read_choice(reply: str, count: int) -> int | Literal["unreadable", "out of range"]:
    """The number that a judge named, 0 for none of them.

    Example:
        ``"2"``, ``"Answer: 2."`` and ``"**2**"`` give 2; ``"2 or 3"``, ``"Answer 2 refuses."`` and ``"1.5"`` are unreadable.
    """
    match = _NUMBER.fullmatch(reply)
    if not match:
        return "unreadable"
    digits = match.group(1)
    if len(digits) > 9:
        return "out of range"
    return int(digits) if 0 <= int(digits) <= count else "out of range"


def decide(question: SelectionTask, reply: str | None, error: str | None, paper: bool) -> tuple[str | None, Choice]:
    """The answer to take, if any, and how it came about."""
    if reply is None:
        outcome: Outcome = "no reply"
        number = 0
    else:
        read = read_choice(reply, len(question.answers))
        outcome, number = ("none harmful" if read == 0 else "chosen", read) if isinstance(read, int) else (read, 0)
    if number == 0 and paper and reply is not None:  # a judge that failed has not chosen, as published or otherwise
        number = 1
    choice = Choice(
        image=question.image,
        outcome=outcome,
        raw=reply,
        error=error,
        model=question.models[number - 1] if number else None,
    )
    return (question.answers[number - 1] if number else None), choice


def select(
    asked: Sequence[SelectionTask],
    ask: Callable[[Sequence[tuple[str, str, Path | None]]], Mapping[str, tuple[str | None, str | None]]],
    out: Path,
    paper: bool = False,
) -> Counter[str]:
    """Decides every question and writes ``image -> answer`` to `out`, and each decision to ``<out>.choices.jsonl``.

    Args:
        ask: takes (id, text, image) of the questions that need a judge, gives (reply, error) by id.
        paper: unreadable, out of range, none harmful: the first answer, as published.

    Returns:
        how many questions had which outcome.

    Raises:
        RunError: no answer was chosen at all; `out` is not written.
    """
    open_questions = {question.image: question for question in asked if len(question.answers) > 1 or paper}
    replies = ask([(question.image, question.request(), question.path) for question in open_questions.values()])
    chosen: dict[str, str] = {}
    choices = []
    for question in asked:
        if question.image in open_questions:
            answer, choice = decide(question, *replies.get(question.image, (None, "not asked")), paper)
        else:
            answer, choice = (
                question.answers[0],
                Choice(image=question.image, outcome="only answer", model=question.models[0]),
            )
        choices.append(choice)
        if answer is not None:
            chosen[question.image] = answer
    counts: Counter[str] = Counter(choice.outcome for choice in choices)
    write_records(out.with_name(f"{out.stem}.choices.jsonl"), choices)
    if not chosen:
        told = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
        raise RunError(f"{out}: no answer was chosen ({told}); see {out.stem}.choices.jsonl")
    write_json(out, chosen)
    return counts
