"""Writes the page with all answers: every question with its image, the answers of all models, and all verdicts."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from vlm_unlearn.errors import printable
from vlm_unlearn.evaluation.generate import OnDone
from vlm_unlearn.records import LABELS, Prompt, Verdict
from vlm_unlearn.reporting.answers.answer_data import AnsweredPrompt, GradedAnswer, RunData, join_prompts, read_run
from vlm_unlearn.reporting.answers.thumbnails import (
    ImageReference,
    Thumbnail,
    delete_stale_thumbnails,
    write_thumbnails,
)
from vlm_unlearn.reporting.page import render_page, template_text
from vlm_unlearn.store import replace_surrogates, write_text

# The state of an answer by one judge: a label, a score without a label, a failed verdict, or no verdict.
STATES = (*LABELS, "score", "failed", "none")
MAX_BYTES = 40_000_000  # of data in the page; more would keep a browser busy for seconds
MAX_TEXT_LENGTHS = (20_000, 4_000, 1_000)  # characters; tried in this order until the data fits

Columns = dict[str, Any]


def write_answers(
    report_dir: Path, runs: Mapping[str, Path], title: str, on_done: OnDone | None = None, max_bytes: int = MAX_BYTES
) -> Path:
    """Writes ``report/answers.html`` with all answers of all runs, and ``report/images/`` with small images.

    The page opens from disk and loads nothing from a network. Its address contains the filter::

        answers.html#model=npo&label=complied&case=unsafe_what&category=Violence&judge=keyword&changed=1&disagree=1&q=recipe&id=...&page=2

    ``label`` and ``case`` (the split) may be repeated. An answer matches if it has one of the labels and is in one of
    the splits.

    Args:
        report_dir: The folder of the report.
        runs: The evaluation folder of each model. Answers are compared with those of the first model. The runs may
            have different prompts.
        title: The title of the report.
        on_done: Called with the stage, the number of finished steps and their total.
        max_bytes: The largest size of the data in the page. If the data is larger, long texts are truncated, then
            questions are left out. The page states both.

    Returns:
        The path of the page.

    Raises:
        UserError: A run is not an evaluation, or one of its files is invalid. A missing or invalid image is not an
            error. The page shows a note in its place.
    """
    loaded = [read_run(model, run) for model, run in runs.items()]
    data = [run for run, _ in loaded]
    images = (image for run in data for prompt in run.prompts.values() if (image := run.image(prompt)) is not None)
    on_image = None if on_done is None else (lambda done, total: on_done("images", done, total))
    image_folder = report_dir / "report" / "images"
    thumbnails = write_thumbnails(image_folder, images, on_image)
    prompts = join_prompts(data, thumbnails)
    labels_by_judge: dict[str, set[str]] = {}
    for run in data:
        for judge, labels in run.labels_by_judge.items():
            labels_by_judge.setdefault(judge, set()).update(labels)
    columns, omissions = fit(prompts, list(runs), max_bytes, labels_by_judge)
    notes = [*(note for _, run_notes in loaded for note in run_notes), *omissions, *_missing_image_notes(prompts)]
    page = render_page(
        "answers.html.j2",
        scripts=["answers_data.js", "answers_text.js", "answers.js"],
        data=columns,
        title=printable(title),
        page_style=Markup(template_text("answers.css")),
        notes=[_sentence(note) for note in notes],
        copied=[_sentence(note) for note in _foreign_folder_notes(data, thumbnails, runs)],
        questions=len(columns["questions"]["id"]),
        answers=len(columns["answers"]["model"]),
        models=len(columns["models"]),
        judges=[printable(columns["texts"][judge]) for judge in columns["judges"]],
    )
    file = report_dir / "report" / "answers.html"
    write_text(file, page)
    delete_stale_thumbnails(image_folder, thumbnails.values())  # only now, because the previous page showed them
    return file


def fit(
    prompts: Sequence[AnsweredPrompt],
    models: Sequence[str],
    max_bytes: int,
    labels_by_judge: Mapping[str, Collection[str]],
) -> tuple[Columns, list[str]]:
    """Returns the columns of the page's data, reduced to a size, and notes on everything that was left out.

    Args:
        prompts: The prompts with their answers.
        models: The names of the models.
        max_bytes: The largest size of the data as JSON.
        labels_by_judge: The labels that each judge can give. A judge that is missing can give all labels.
    """
    columns = to_columns(prompts, models, labels_by_judge)
    size = _json_size(columns)
    if size <= max_bytes:
        return columns, []
    for max_length in MAX_TEXT_LENGTHS:
        columns = to_columns(prompts, models, labels_by_judge, max_length)
        size = _json_size(columns)
        if size <= max_bytes:
            break
    notes = []
    if columns["truncated"]:
        notes.append(
            f"{len(columns['truncated']):,} texts of more than {max_length:,} characters are truncated, because the "
            "complete texts are too large for one page. Each run's prompts.jsonl, responses.jsonl and verdicts-*.jsonl "
            "contain them"
        )
    subset: Sequence[AnsweredPrompt] = prompts
    while size > max_bytes and len(subset) > 1:
        share = 0.95 * max_bytes / size * len(subset) / len(prompts)
        subset = _first_groups(prompts, share)[: len(subset) - 1]  # at least one prompt fewer each time
        columns = to_columns(subset, models, labels_by_judge, max_length)
        size = _json_size(columns)
    if len(subset) < len(prompts):
        notes.append(
            f"{len(prompts) - len(subset):,} of {len(prompts):,} questions are left out, the last ones of each split, "
            "because all of them are too large for one page. To see more of them, make a report of fewer runs, or read "
            "each run's responses.jsonl"
        )
    if size > max_bytes:
        notes.append(f"The answers to one question alone take {size / 1e6:,.1f} MB, so this page may take long to open")
    return columns, notes


def _json_size(columns: Columns) -> int:
    return len(json.dumps(columns, separators=(",", ":")))


def _first_groups(prompts: Sequence[AnsweredPrompt], share: float) -> list[AnsweredPrompt]:
    """Returns the prompts of the first groups of each split, at least one group of each."""
    group_numbers: dict[str, dict[str, int]] = {}
    for answered in prompts:
        in_split = group_numbers.setdefault(answered.prompt.set, {})
        in_split.setdefault(answered.prompt.group_id, len(in_split))
    limits = {split: max(1, int(share * len(groups))) for split, groups in group_numbers.items()}
    return [
        answered
        for answered in prompts
        if group_numbers[answered.prompt.set][answered.prompt.group_id] < limits[answered.prompt.set]
    ][: max(1, int(share * len(prompts)) + 1)]


def _sentence(note: str) -> str:
    return f"{printable(note).rstrip('.')}."


def _missing_image_notes(prompts: Iterable[AnsweredPrompt]) -> list[str]:
    problems = [answered.thumbnail.problem for answered in prompts if answered.thumbnail.problem]
    questions = (
        "question is shown without its image" if len(problems) == 1 else "questions are shown without their image"
    )
    return [f"{len(problems):,} {questions}. The first problem: {problems[0]}"] if problems else []


def _foreign_folder_notes(
    data: Iterable[RunData], thumbnails: Mapping[ImageReference, Thumbnail], runs: Mapping[str, Path]
) -> list[str]:
    """Returns a note for each folder outside the runs' surroundings from which images were copied.

    A suite from somebody else may name any folder of this machine, also one with private images.
    """
    counts: dict[Path, int] = {}
    for run in data:
        surroundings = runs[run.model].resolve().parent
        images = dict.fromkeys(image for prompt in run.prompts.values() if (image := run.image(prompt)) is not None)
        for image in images:
            root = image[0]
            if root is not None and thumbnails[image].file and not root.resolve().is_relative_to(surroundings):
                counts[root] = counts.get(root, 0) + 1
    return [
        f"This report contains small copies of {count:,} image{'' if count == 1 else 's'} from {root}. "
        "Check them before you share the report"
        for root, count in counts.items()
    ]


class TextTable:
    """A list of distinct texts. The columns contain indices into it.

    Args:
        max_length: The number of characters after which texts are truncated; None for no limit.
    """

    def __init__(self, max_length: int | None) -> None:
        self.texts: list[str] = []
        self.truncated: dict[int, int] = {}  # index of a truncated text -> its complete length
        self._max_length = max_length
        self._indices: dict[str, int] = {}

    def index(self, text: str | None) -> int:
        """Returns the index of a text and adds it if it is new, or -1 for None."""
        if text is None:
            return -1
        index = self._indices.get(text)
        if index is None:
            index = self._indices[text] = len(self.texts)
            if self._max_length is not None and len(text) > self._max_length:
                self.truncated[index] = len(text)
            self.texts.append(replace_surrogates(text[: self._max_length]))
        return index


def to_columns(
    prompts: Sequence[AnsweredPrompt],
    models: Sequence[str],
    labels_by_judge: Mapping[str, Collection[str]],
    max_length: int | None = None,
) -> Columns:
    """Returns prompts and answers in the form that the page's script reads: columns of numbers, and each text once.

    In place of a text there is its index in ``texts``, or -1. Answers are ordered by question, model and sample.
    ``verdicts`` has one entry for each judge with four columns over the answers: the index of the state in ``states``,
    the score, the judge's reply, and the error. ``labels`` has the indices of the labels that each judge can give.

    Args:
        prompts: The prompts with their answers.
        models: The names of the models.
        labels_by_judge: The labels that each judge can give. A judge that is missing can give all labels.
        max_length: The number of characters after which texts are truncated; None for no limit.
    """
    texts = TextTable(max_length)
    order = {model: number for number, model in enumerate(models)}
    numbered = [
        (number, answer)
        for number, answered in enumerate(prompts)
        for answer in sorted(answered.answers, key=lambda answer: order[answer.model])
    ]
    answers = [answer for _, answer in numbered]
    judges = list(dict.fromkeys(judge for answer in answers for judge in (answer.judge, *answer.verdicts) if judge))
    thumbnails = list(dict.fromkeys(answered.thumbnail for answered in prompts))
    return {
        "states": STATES,
        "models": [texts.index(model) for model in models],
        "judges": [texts.index(judge) for judge in judges],
        "labels": [
            [STATES.index(label) for label in LABELS if label in labels_by_judge.get(judge, LABELS)] for judge in judges
        ],
        "images": [
            [thumbnail.file, thumbnail.width, thumbnail.height, texts.index(thumbnail.problem or None)]
            for thumbnail in thumbnails
        ],
        "questions": _question_columns(prompts, thumbnails, texts),
        "answers": {
            "question": [number for number, _ in numbered],
            "model": [order[answer.model] for answer in answers],
            "sample": [answer.response.sample for answer in answers],
            "text": [texts.index(answer.response.text) for answer in answers],
            "finish": [texts.index(answer.response.finish_reason) for answer in answers],
            "error": [texts.index(answer.response.error) for answer in answers],
            "judge": [judges.index(answer.judge) if answer.judge else -1 for answer in answers],
        },
        "verdicts": [_verdict_columns(answers, judge, texts) for judge in judges],
        "texts": texts.texts,
        "truncated": texts.truncated,
    }


def _transcript(prompt: Prompt) -> str:
    """Returns the question, with the system message, the earlier rounds and the prefill if there are any."""
    lines = [] if prompt.system is None else [f"System: {prompt.system}"]
    for turn in prompt.history:
        lines += [f"User: {turn.question}", f"Assistant: {turn.answer}"]
    lines.append(f"User: {prompt.question}")
    if prompt.prefill is not None:
        lines.append(f"Assistant: {prompt.prefill} ...")
    return "\n".join(lines) if len(lines) > 1 else prompt.question


def _question_columns(prompts: Sequence[AnsweredPrompt], thumbnails: Sequence[Thumbnail], texts: TextTable) -> Columns:
    records = [answered.prompt for answered in prompts]
    indices = {thumbnail: index for index, thumbnail in enumerate(thumbnails)}
    return {
        "id": [texts.index(prompt.id) for prompt in records],
        "group": [texts.index(prompt.group_id) for prompt in records],
        "rewrite": [prompt.rewrite for prompt in records],
        "split": [texts.index(prompt.set) for prompt in records],
        "kind": [texts.index(prompt.kind) for prompt in records],
        "category": [texts.index(prompt.category or None) for prompt in records],
        "text": [texts.index(_transcript(prompt)) for prompt in records],
        "reference": [texts.index(prompt.reference) for prompt in records],
        "image": [indices[answered.thumbnail] for answered in prompts],
    }


def _verdict_columns(answers: Sequence[GradedAnswer], judge: str, texts: TextTable) -> Columns:
    verdicts = [answer.verdicts.get(judge) for answer in answers]
    return {
        "state": [STATES.index(_state(answer, judge)) for answer in answers],
        "score": [None if verdict is None else verdict.score for verdict in verdicts],
        "raw": [texts.index(None if verdict is None else verdict.raw) for verdict in verdicts],
        "error": [texts.index(None if verdict is None else verdict.error) for verdict in verdicts],
    }


def _state(answer: GradedAnswer, judge: str) -> str:
    verdict: Verdict | None = answer.verdicts.get(judge)
    if verdict is None:
        return "failed" if answer.judge == judge and answer.response.error is not None else "none"
    if verdict.label is not None:
        return verdict.label
    return "score" if verdict.score is not None else "failed"
