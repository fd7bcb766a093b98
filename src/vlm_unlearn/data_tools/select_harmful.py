"""Safety Mirage's *select harmful* step: a judge chooses the most harmful of several models' answers to a question.

The forget set unlearns the chosen answers. A reply that is not a choice is recorded as such, and the question is left
out and counted. With ``paper_compat=True`` the first number anywhere in the reply is the choice, and a question without
a valid number gets the first answer, as published.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from vlm_unlearn.data.fence import fence
from vlm_unlearn.data.formats import vlguard
from vlm_unlearn.data.images import resolve_image
from vlm_unlearn.data_tools.pipeline import read_answers
from vlm_unlearn.data_tools.prompts import template
from vlm_unlearn.errors import Problems, RunError, UserError, quoted, report_problem
from vlm_unlearn.records import Kind, Record
from vlm_unlearn.store import write_json, write_records

Outcome = Literal[
    "chosen", "only answer", "none harmful", "unreadable", "out of range", "no reply", "no answer", "image asked before"
]
# Takes (id, prompt, image) of each question and returns (reply, error) by id.
Judge = Callable[[Sequence[tuple[str, str, Path | None]]], Mapping[str, tuple[str | None, str | None]]]
# A number alone, with an optional name. A sentence about an answer could mean that it is not the most harmful one.
MAX_CHOICE_LENGTH = 10_000  # the pattern takes quadratic time
_NUMBER = re.compile(
    r"\W*?(?:(?:the )?(?:answer|number|choice|option)(?: is| number)?\b)?[^\w-]*(-?\d+)\W*", re.IGNORECASE
)


@dataclass(frozen=True)
class SelectionTask:
    """An unsafe question and the answers to choose from, in the order of the answer files."""

    image: str  # the path in the record, which is also the key of the answer files
    path: Path | None
    question: str
    answers: tuple[str, ...]
    models: tuple[str, ...]  # the model of each answer
    record_id: str | None = None  # the key of the answer files, if that is the record's id

    @property
    def key(self) -> str:
        """The key of the question in the answer files."""
        return self.image if self.record_id is None else self.record_id

    def request(self, paper_compat: bool = False) -> str:
        """Returns the judge's prompt, with every answer between fence lines.

        Args:
            paper_compat: The prompt contains the name of the image instead of the question, and the judge has to choose
                one of the answers, as published.
        """
        if paper_compat:
            line = fence(self.image, *self.answers)
            numbered = "\n".join(f"{number}.\n{line}\n{text}\n{line}" for number, text in enumerate(self.answers, 1))
            return template("select_harmful_paper").format(fence=line, image=self.image, answers=numbered)
        line = fence(self.question, *self.answers)
        numbered = "\n\n".join(
            f"Answer {number}:\n{line}\n{text}\n{line}" for number, text in enumerate(self.answers, start=1)
        )
        return template("select_harmful").format(
            count=len(self.answers), fence=line, question=self.question, answers=numbered
        )


class Choice(Record):
    """The decision about one question, a line of ``OUT.choices.jsonl``."""

    image: str
    outcome: Outcome
    model: str | None = None  # the model of the chosen answer
    raw: str | None = None  # the judge's reply
    error: str | None = None
    record_id: str | None = Field(default=None, exclude_if=lambda value: value is None)  # the key in the answer files


def answer_files(paths: Sequence[Path]) -> list[Path]:
    """Returns the answer files that paths name. A folder stands for its .json files, in the order of their names.

    The result of the published script, ``aggregated_results.json``, is not an answer file.

    Raises:
        UserError: A folder contains no answer file.
    """
    files = []
    for path in paths:
        names = sorted(path.glob("*.json")) if path.is_dir() else [path]
        names = [file for file in names if file == path or file.name != "aggregated_results.json"]
        if not names:
            raise UserError("contains no .json file with the answers of a model", code="no-records", file=path)
        files += names
    return files


def read_selection_tasks(
    source: Path,
    answers: Sequence[Path],
    images: Path | None,
    problems: Problems | None,
    kind: Kind = "unsafe",
    paper_compat: bool = False,
) -> tuple[list[SelectionTask], Counter[str]]:
    """Reads the unsafe questions of a VLGuard file with all available answers to each.

    Files that are keyed by image have no answers to a second question about an image, which is left out.

    Args:
        source: A VLGuard file.
        answers: One JSON file ``image -> answer`` or ``record id -> answer`` per model, or folders of such files. The
            stem of the file name is the name of the model.
        images: The image root. None asks the judge without images.
        problems: Collects broken records. Without it the first one raises.
        kind: The questions: ``unsafe`` (about unsafe images) or ``safe_image_unsafe_question``.
        paper_compat: Offers empty answers to the judge too, as published.

    Returns:
        The questions, and the number of questions that were left out, by outcome.

    Raises:
        UserError: A file is broken, two answer files have the same stem, or no answer belongs to an unsafe image.
    """
    answers_by_model: dict[str, dict[str, str]] = {}
    paths = answer_files(answers)
    for path in paths:
        if path.stem in answers_by_model:
            message = f"two answer files are named {quoted(path.stem)}, but the names identify the models. Rename one."
            raise UserError(message, code="duplicate-key", file=path)
        answers_by_model[path.stem] = read_answers(path)
    tasks: dict[str, SelectionTask] = {}
    left_out: Counter[str] = Counter()
    for raw, pairs in vlguard.read_records(source, None, problems):
        pair = next((pair for pair in pairs if pair.kind == kind), None)
        if pair is None:
            continue
        has_own_answers = any(pair.record_id in model_answers for model_answers in answers_by_model.values())
        key = pair.record_id if has_own_answers else pair.image
        if key in tasks:
            left_out["image asked before"] += 1
            continue
        candidates = {
            model: model_answers[key]
            for model, model_answers in answers_by_model.items()
            if (key in model_answers if paper_compat else model_answers.get(key, "").strip())
        }
        if not candidates:
            left_out["no answer"] += 1
            continue
        try:
            image_path = None if images is None else resolve_image(images, pair.image, raw.file, raw.position)
        except UserError as error:
            report_problem(error, problems)
            continue
        tasks[key] = SelectionTask(
            image=pair.image,
            path=image_path,
            question=pair.question,
            answers=tuple(candidates.values()),
            models=tuple(candidates),
            record_id=pair.record_id if has_own_answers else None,
        )
    if not tasks:
        image = "an unsafe record" if kind == "unsafe" else "an unsafe question on a safe image"
        raise UserError(f"names no image of {image} of {source}", code="no-records", file=paths[0])
    return list(tasks.values()), left_out


def read_choice(reply: str, count: int) -> int | Literal["unreadable", "out of range"]:
    """Returns the number in a judge's reply, from 1 to `count`, or 0 for none of the answers.

    Example:
        ``"2"``, ``"Answer: 2."`` and ``"**2**"`` give 2.
        ``"2 or 3"``, ``"Answer 2 refuses."`` and ``"1.5"`` are unreadable.
    """
    match = _NUMBER.fullmatch(reply) if len(reply) <= MAX_CHOICE_LENGTH else None
    if not match:
        return "unreadable"
    digits = match.group(1)
    if len(digits) > 9:
        return "out of range"
    return int(digits) if 0 <= int(digits) <= count else "out of range"


def read_published_choice(reply: str, count: int) -> int | Literal["unreadable", "out of range"]:
    """Returns the first number anywhere in a judge's reply, from 1 to `count`, as the published script reads it.

    Example:
        ``"The most harmful is 3."`` gives 3, and ``"1.5"`` gives 1.
    """
    try:
        number = int(reply)  # also reads a sign
    except ValueError:
        match = re.search(r"\d+", reply)
        if match is None:
            return "unreadable"
        digits = match.group().lstrip("0")
        number = int(digits or "0") if len(digits) <= 9 else count + 1
    return number if 1 <= number <= count else "out of range"


def decide(task: SelectionTask, reply: str | None, error: str | None, paper_compat: bool) -> tuple[str | None, Choice]:
    """Returns the chosen answer, or None, and the record of the decision.

    Args:
        reply: The judge's reply, or None if the judge failed.
        error: The reason of the failure.
        paper_compat: Takes the first number in the reply, or the first answer if there is none in range, as published.
            Without a reply no answer is chosen.
    """
    outcome: Outcome
    number = 0
    if reply is None:
        outcome = "no reply"
    else:
        choice = (read_published_choice if paper_compat else read_choice)(reply, len(task.answers))
        if isinstance(choice, str):
            outcome = choice
        else:
            outcome, number = ("chosen" if choice else "none harmful"), choice
        if number == 0 and paper_compat:
            number = 1
    model = task.models[number - 1] if number else None
    answer = task.answers[number - 1] if number else None
    choice_record = Choice(
        image=task.image, outcome=outcome, raw=reply, error=error, model=model, record_id=task.record_id
    )
    return answer, choice_record


def select(tasks: Sequence[SelectionTask], judge: Judge, out: Path, paper_compat: bool = False) -> Counter[str]:
    """Decides every question and writes the chosen answers.

    Args:
        judge: Answers the judge's prompts. It is called once, with all questions that have several answers.
        out: The file to write, ``image -> answer`` (or ``record id -> answer``, as the answer files). Every decision is
            written to ``<out>.choices.jsonl``.
        paper_compat: Uses the published prompt's form, and takes the first number in a reply, or the first answer.

    Returns:
        The number of questions by outcome.

    Raises:
        RunError: No answer was chosen. `out` is not written.
    """
    judged = {task.key: task for task in tasks if len(task.answers) > 1 or paper_compat}
    replies = judge([(key, task.request(paper_compat), task.path) for key, task in judged.items()])
    answers: dict[str, str] = {}
    choices = []
    for task in tasks:
        answer: str | None
        if task.key in judged:
            answer, choice = decide(task, *replies.get(task.key, (None, "not asked")), paper_compat)
        else:
            answer = task.answers[0]
            choice = Choice(image=task.image, outcome="only answer", model=task.models[0], record_id=task.record_id)
        choices.append(choice)
        if answer is not None:
            answers[task.key] = answer
    counts: Counter[str] = Counter(choice.outcome for choice in choices)
    choices_file = out.with_name(f"{out.stem}.choices.jsonl")
    write_records(choices_file, choices)
    if not answers:
        outcomes = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
        raise RunError(f"no answer was chosen ({outcomes}). See {choices_file}.", code="no-verdicts", file=out)
    write_json(out, answers)
    return counts
