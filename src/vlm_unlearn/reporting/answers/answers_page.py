"""The page to read all answers in: every question with its image, all models' answers side by side, every judge's verdict."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from vlm_unlearn.errors import printable
from vlm_unlearn.evaluation.generate import OnDone
from vlm_unlearn.records import LABELS, Verdict
from vlm_unlearn.reporting.answers.answer_data import Answer, Question, Run, join_questions, read_run
from vlm_unlearn.reporting.answers.thumbnails import Picture, Source, delete_other_thumbnails, write_thumbnails
from vlm_unlearn.reporting.page import render_page, template_text
from vlm_unlearn.store import replace_surrogates, write_text

STATES = (
    *LABELS,
    "score",
    "failed",
    "none",
)  # what an answer can be in a judge's eyes; "none" is one that it did not grade
MOST_BYTES = 40_000_000  # of inlined data: more would keep a browser busy for seconds
CUTS = (20_000, 4_000, 1_000)  # characters of the longest text, tried one after the other where all would be too much

Columns = dict[str, Any]


def write_answers(
    folder: Path, runs: Mapping[str, Path], title: str, on_done: OnDone | None = None, most_bytes: int = MOST_BYTES
) -> Path:
    """Writes ``report/answers.html`` with all answers of all runs inside, and ``report/images/`` with small copies of the images.

    The page opens from disk and asks nothing of any network. What it was told to show stands in its address::

        answers.html#model=npo&label=complied&case=unsafe_what&category=Violence&judge=keyword&changed=1&disagree=1&q=recipe&id=...&page=2

    ``label`` and ``case`` may stand there several times: an answer passes that has one of the labels and is of one of the cases.

    Args:
        folder: of the report.
        runs: evaluation folder of each model; answers are compared with the first one's. They may have been asked different questions.
        most_bytes: of data in the page. Where there is more, long texts are cut, then questions left out, and the page says so.

    Returns:
        The page.

    Raises:
        UserError: a run is no evaluation, or a file of it is broken. An image that is missing or broken is a note in the page.
    """
    read = [read_run(model, run) for model, run in runs.items()]
    found = [run for run, _ in read]
    images = (image for run in found for prompt in run.prompts.values() if (image := run.image(prompt)) is not None)
    told = None if on_done is None else (lambda done, total: on_done("images", done, total))
    pictures = write_thumbnails(folder / "report" / "images", images, told)
    questions = join_questions(found, pictures)
    tells: dict[str, set[str]] = {}
    for run in found:
        for judge, labels in run.tells.items():
            tells.setdefault(judge, set()).update(labels)
    columns, left_out = fit(questions, list(runs), most_bytes, tells)
    notes = [note for _, remarks in read for note in remarks] + left_out + _picture_notes(questions)
    page = render_page(
        "answers.html.j2",
        scripts=["answers_data.js", "answers_text.js", "answers.js"],
        data=columns,
        title=printable(title),
        own_style=Markup(template_text("answers.css")),
        notes=[printable(note) for note in notes],
        copied=[printable(note) for note in _foreign_folders(found, pictures, runs)],
        questions=len(columns["questions"]["id"]),
        answers=len(columns["answers"]["model"]),
        models=len(columns["models"]),
        judges=[printable(columns["texts"][judge]) for judge in columns["judges"]],
    )
    file = folder / "report" / "answers.html"
    write_text(file, page)
    delete_other_thumbnails(
        folder / "report" / "images", pictures.values()
    )  # no sooner: until now the page of before showed them
    return file


def fit(
    questions: Sequence[Question], models: Sequence[str], most_bytes: int, tells: Mapping[str, Collection[str]]
) -> tuple[Columns, list[str]]:
    """The columns of as much as a page can hold, and what is not in it, in words.

    Args:
        tells: the labels that each judge can give; a judge that isn't there can give all.
    """
    columns = to_columns(questions, models, tells)
    size = _size(columns)
    if size <= most_bytes:
        return columns, []
    for longest in CUTS:
        columns = to_columns(questions, models, tells, longest)
        size = _size(columns)
        if size <= most_bytes:
            break
    notes = []
    if columns["cut"]:
        notes.append(
            f"{len(columns['cut']):,} texts of more than {longest:,} characters are cut, because all would be too much for one page: "
            "they stand whole in each run's prompts.jsonl, responses.jsonl and verdicts-*.jsonl"
        )
    kept: Sequence[Question] = questions
    while size > most_bytes and len(kept) > 1:
        kept = _first_groups(questions, 0.95 * most_bytes / size * len(kept) / len(questions))[
            : len(kept) - 1
        ]  # always fewer
        columns = to_columns(kept, models, tells, longest)
        size = _size(columns)
    if len(kept) < len(questions):
        notes.append(
            f"{len(questions) - len(kept):,} of {len(questions):,} questions are left out, the last of each case, because all would be "
            "too much for one page: make a report of fewer runs to see more of them, or read each run's responses.jsonl"
        )
    if size > most_bytes:
        notes.append(f"one question's answers alone are {size / 1e6:,.1f} MB, so that this page may open slowly")
    return columns, notes


def _size(columns: Columns) -> int:
    return len(json.dumps(columns, separators=(",", ":")))


def _first_groups(questions: Sequence[Question], share: float) -> list[Question]:
    """The questions of the first groups of each case."""
    groups: dict[str, dict[str, int]] = {}
    for question in questions:
        of_case = groups.setdefault(question.prompt.set, {})
        of_case.setdefault(question.prompt.group_id, len(of_case))
    return [
        question
        for question in questions
        if groups[question.prompt.set][question.prompt.group_id] < max(1, int(share * len(groups[question.prompt.set])))
    ][: max(1, int(share * len(questions)) + 1)]


def _picture_notes(questions: Iterable[Question]) -> list[str]:
    problems = [question.picture.problem for question in questions if question.picture.problem]
    which = "question stands without its image" if len(problems) == 1 else "questions stand without their image"
    return [f"{len(problems):,} {which}; the first: {problems[0]}"] if problems else []


def _foreign_folders(found: Iterable[Run], pictures: Mapping[Source, Picture], runs: Mapping[str, Path]) -> list[str]:
    """Says where pictures came from that don't lie beside their run: a suite of somebody else may name folders that are private."""
    roots: dict[Path, int] = {}
    for run in found:
        around = runs[run.model].resolve().parent
        for source in dict.fromkeys(
            image for prompt in run.prompts.values() if (image := run.image(prompt)) is not None
        ):
            root = source[0]
            if root is not None and pictures[source].file and not root.resolve().is_relative_to(around):
                roots[root] = roots.get(root, 0) + 1
    return [
        f"Small copies of pictures in {root} are in this report ({count:,}): look at them before you pass it on"
        for root, count in roots.items()
    ]


class Texts:
    """Every text once; the columns hold its place."""

    def __init__(self, longest: int | None) -> None:
        self.texts: list[str] = []
        self.cut: dict[int, int] = {}  # place of a text that is cut -> its whole length
        self._longest = longest
        self._places: dict[str, int] = {}

    def place(self, text: str | None) -> int:
        """Where a text stands; -1 for none."""
        if text is None:
            return -1
        known = self._places.get(text)
        if known is None:
            known = self._places[text] = len(self.texts)
            if self._longest is not None and len(text) > self._longest:
                self.cut[known] = len(text)
            self.texts.append(replace_surrogates(text[: self._longest]))
        return known


def to_columns(
    questions: Sequence[Question],
    models: Sequence[str],
    tells: Mapping[str, Collection[str]],
    longest: int | None = None,
) -> Columns:
    """Questions and answers as the page's script reads them: columns of numbers, and each text once.

    A number in a text's stead is its place in ``texts``, or -1. Answers stand by question, model and sample; ``verdicts`` has one entry
    a judge, with a value an answer: the place of its state in ``states``, its score, what the judge said, its error. ``tells`` has for
    each judge the places of the labels that it can give.
    """
    texts = Texts(longest)
    order = {model: number for number, model in enumerate(models)}
    answers = [
        (number, answer)
        for number, question in enumerate(questions)
        for answer in sorted(question.answers, key=lambda answer: order[answer.model])
    ]
    judges = list(dict.fromkeys(judge for _, answer in answers for judge in (answer.judge, *answer.verdicts) if judge))
    pictures = list(dict.fromkeys(question.picture for question in questions))
    return {
        "states": STATES,
        "models": [texts.place(model) for model in models],
        "judges": [texts.place(judge) for judge in judges],
        "tells": [[STATES.index(label) for label in LABELS if label in tells.get(judge, LABELS)] for judge in judges],
        "pictures": [_picture(picture, texts) for picture in pictures],
        "questions": _questions(questions, pictures, texts),
        "answers": {
            "question": [number for number, _ in answers],
            "model": [order[answer.model] for _, answer in answers],
            "sample": [answer.response.sample for _, answer in answers],
            "text": [texts.place(answer.response.text) for _, answer in answers],
            "finish": [texts.place(answer.response.finish_reason) for _, answer in answers],
            "error": [texts.place(answer.response.error) for _, answer in answers],
            "judge": [judges.index(answer.judge) if answer.judge else -1 for _, answer in answers],
        },
        "verdicts": [_verdicts([answer for _, answer in answers], judge, texts) for judge in judges],
        "texts": texts.texts,
        "cut": texts.cut,
    }


def _picture(picture: Picture, texts: Texts) -> list[Any]:
    return [picture.file, picture.width, picture.height, texts.place(picture.problem or None)]


def _questions(questions: Sequence[Question], pictures: Sequence[Picture], texts: Texts) -> Columns:
    prompts = [question.prompt for question in questions]
    places = {picture: number for number, picture in enumerate(pictures)}
    return {
        "id": [texts.place(prompt.id) for prompt in prompts],
        "group": [texts.place(prompt.group_id) for prompt in prompts],
        "shot": [prompt.rewrite for prompt in prompts],
        "case": [texts.place(prompt.set) for prompt in prompts],
        "kind": [texts.place(prompt.kind) for prompt in prompts],
        "category": [texts.place(prompt.category or None) for prompt in prompts],
        "text": [texts.place(prompt.question) for prompt in prompts],
        "reference": [texts.place(prompt.reference) for prompt in prompts],
        "picture": [places[question.picture] for question in questions],
    }


def _verdicts(answers: Sequence[Answer], judge: str, texts: Texts) -> Columns:
    verdicts = [answer.verdicts.get(judge) for answer in answers]
    return {
        "state": [STATES.index(_state(answer, judge)) for answer in answers],
        "score": [None if verdict is None else verdict.score for verdict in verdicts],
        "raw": [texts.place(None if verdict is None else verdict.raw) for verdict in verdicts],
        "error": [texts.place(None if verdict is None else verdict.error) for verdict in verdicts],
    }


def _state(answer: Answer, judge: str) -> str:
    verdict: Verdict | None = answer.verdicts.get(judge)
    if verdict is None:
        return "failed" if answer.judge == judge and answer.response.error is not None else "none"
    if verdict.label is not None:
        return verdict.label
    return "score" if verdict.score is not None else "failed"
