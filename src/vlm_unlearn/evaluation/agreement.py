"""Agreement of judges with each other and with human labels, on the answers of one run."""

from __future__ import annotations

import csv
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from vlm_unlearn.errors import UserError, nearest, quoted
from vlm_unlearn.generation.base import ResponseKey
from vlm_unlearn.metrics.agreement import kappa_rate, sensitivity_and_specificity
from vlm_unlearn.records import LABELS, Kappa, Prompt, Rate, Record
from vlm_unlearn.store import EvaluationRun, not_utf8, open_atomically

HUMAN = "human"  # the name of the labels from a CSV file, in the place of a judge's name
POSITIVE_SCORE = 0.5  # scores from here on count as the positive label, for a judge that returns scores only


class Agreement(Record):
    """The agreement of a judge with a reference, on the answers that both have graded."""

    reference: str
    judge: str
    kappa: Kappa | None  # over all labels; None if one of the two returns scores only
    kappa_positive: Kappa  # the positive label against all others
    true_positive_rate: Rate
    true_negative_rate: Rate


@dataclass(frozen=True)
class Grades:
    """The grades of one judge or of human annotators, by answer.

    Attributes:
        name: The judge's name, or ``"human"``.
        labels: The label of each answer, None for a failed verdict. For a judge that returns scores only, the values
            are ``"yes"`` (at least `POSITIVE_SCORE`) and ``"no"``.
        scores_only: Whether the judge returns scores only.
    """

    name: str
    labels: Mapping[ResponseKey, str | None]
    scores_only: bool = False

    def is_positive(self, key: ResponseKey, positive: str) -> bool:
        """Returns whether an answer's label is the positive one, or its score is high enough."""
        return self.labels[key] == ("yes" if self.scores_only else positive)


def judge_agreement(
    run: str | PathLike[str], judges: Sequence[str], human: Path | None, positive: str
) -> list[Agreement]:
    """Compares every judge with human labels, or with the first judge if there are no human labels.

    Args:
        run: The run folder, as a path or as an `EvaluationRun`.
        judges: Names of verdict files of the run. Empty: all of them.
        human: A CSV file with the columns ``prompt_id``, ``label`` and optionally ``sample``.
        positive: The label whose detection is measured. For a judge that returns scores only, a score of at least 0.5
            counts as this label.

    Raises:
        UserError: A judge has not graded the run, there are fewer than two graders, or the CSV file is broken.
    """
    if positive not in LABELS:
        raise UserError(_unknown_label(positive, positive), code="unknown-name", field="--positive")
    run = EvaluationRun(run)
    prompts, responses = run.read_answers()
    keys = {response.key for response in responses}
    verdict_files = run.verdicts_files()
    for judge in judges:
        if judge not in verdict_files:
            available = ", ".join(verdict_files) or "none"
            raise UserError(
                f"no verdicts of {quoted(judge)}{nearest(judge, verdict_files) or '.'} Available: {available}.",
                code="no-verdicts",
                file=run.path,
            )
    graders = [_read_judge(run, judge, keys) for judge in dict.fromkeys(judges or verdict_files)]
    if human is not None:
        graders.insert(0, _read_human_labels(human, keys))
    if len(graders) < 2:
        raise UserError(
            "agreement needs two graders. Grade the run with another judge, or pass --human LABELS.csv.",
            code="no-verdicts",
            file=run.path,
        )
    reference, *compared = graders
    return [_compare(reference, grades, prompts, positive) for grades in compared]


def _unknown_label(text: str, label: str) -> str:
    return f"{quoted(text)} is not a label{nearest(label, LABELS) or '.'} Labels: {', '.join(LABELS)}."


def _compare(reference: Grades, judge: Grades, prompts: Mapping[str, Prompt], positive: str) -> Agreement:
    common_keys = [key for key in reference.labels if key in judge.labels]
    if not common_keys:
        raise UserError(f"{reference.name} and {judge.name} have graded no common answer.", code="no-verdicts")
    keys = [key for key in common_keys if reference.labels[key] is not None and judge.labels[key] is not None]
    failed = len(common_keys) - len(keys)
    clusters = [prompts[id].group_id for id, _ in keys]
    kappa = None
    if not (reference.scores_only or judge.scores_only):
        kappa = kappa_rate([(str(reference.labels[key]), str(judge.labels[key])) for key in keys], clusters, failed)
    positives = [(reference.is_positive(key, positive), judge.is_positive(key, positive)) for key in keys]
    sensitivity, specificity = sensitivity_and_specificity(positives, clusters, failed)
    return Agreement(
        reference=reference.name,
        judge=judge.name,
        kappa=kappa,
        kappa_positive=kappa_rate([(str(expected), str(actual)) for expected, actual in positives], clusters, failed),
        true_positive_rate=sensitivity,
        true_negative_rate=specificity,
    )


def _read_judge(run: EvaluationRun, name: str, keys: Collection[ResponseKey]) -> Grades:
    """Reads a judge's verdicts on the answers with `keys`: labels if there are any, else scores as yes or no."""
    verdicts = [verdict for verdict in run.read_verdicts(name) if verdict.key in keys]
    if any(verdict.label is not None for verdict in verdicts):
        return Grades(name, {verdict.key: verdict.label for verdict in verdicts})
    answers = {
        verdict.key: None if verdict.score is None else "yes" if verdict.score >= POSITIVE_SCORE else "no"
        for verdict in verdicts
    }
    return Grades(name, answers, scores_only=True)


def _read_human_labels(file: Path, keys: Collection[ResponseKey]) -> Grades:
    """Reads a CSV file with the columns prompt_id, label and optionally sample. Skips rows with an empty label."""
    labels: dict[ResponseKey, str | None] = {}
    try:
        with file.open(encoding="utf-8-sig", newline="") as handle:
            for number, row in enumerate(csv.DictReader(handle), start=1):
                parsed = _parse_human_label(row, file, number, keys)
                if parsed is not None and labels.setdefault(parsed[0], parsed[1]) != parsed[1]:
                    raise UserError(
                        "the answer has two different labels. Keep one row per answer.",
                        code="duplicate-id",
                        file=file,
                        record=number,
                    )
    except OSError as error:
        raise UserError(f"{error.strerror}.", code="file-unreadable", file=file) from None
    except UnicodeDecodeError:
        raise not_utf8(file) from None
    except csv.Error as error:
        raise UserError(f"the file is not a CSV file ({error}).", code="invalid-table", file=file) from None
    if not labels:
        raise UserError("no row has a label. Fill in the column label.", code="no-records", file=file)
    return Grades(HUMAN, labels)


def _parse_human_label(
    row: Mapping[str, str | None], file: Path, number: int, keys: Collection[ResponseKey]
) -> tuple[ResponseKey, str] | None:
    """Returns the answer's key and its label, or None for a row without a label.

    Args:
        row: The cells of the row by column.
        file: The CSV file, for error messages.
        number: The number of the row below the header, from 1, for error messages.
        keys: Keys of the run's answers.
    """
    id, text = row.get("prompt_id"), row.get("label")
    if id is None or text is None:
        raise UserError(
            "the row needs the columns prompt_id and label.", code="missing-field", file=file, record=number
        )
    if id.startswith("'") and (id, 0) not in keys:
        id = id[1:]  # the apostrophe that `export_for_labeling` adds to an id that looks like a formula
    label = text.strip().lower().replace(" ", "_")
    if not label:
        return None
    if label not in LABELS:
        raise UserError(_unknown_label(text, label), code="unknown-name", file=file, record=number, field="label")
    sample = (row.get("sample") or "0").strip()
    if not sample.isdecimal() or len(sample) > 9:
        raise UserError(
            f"must be a number, not {quoted(sample)}.", code="invalid-field", file=file, record=number, field="sample"
        )
    key = (id, int(sample))
    if key not in keys:
        raise UserError(
            f"the run has no answer {key[1]} to a prompt {quoted(id)}. Use the prompt ids of the run.",
            code="unknown-name",
            file=file,
            record=number,
            field="prompt_id",
        )
    return key, label


def export_for_labeling(run: str | PathLike[str], out: Path, count: int, seed: int) -> int:
    """Writes a random sample of a run's answers to a CSV file for human labeling.

    The sample contains the same number of answers from each split, as far as the splits have that many. A prefilled
    beginning of an answer is in square brackets. It is not by the model.

    Args:
        run: The run folder, as a path or as an `EvaluationRun`.
        out: The CSV file to write. It must not exist.
        count: The number of answers.
        seed: Seed of the sample.

    Returns:
        The number of answers in the file. It is below `count` if the run has fewer answers.

    Raises:
        UserError: `out` exists, or the run is not finished.
    """
    prompts, responses = EvaluationRun(run).read_answers()
    answered = [response for response in responses if response.text is not None]
    indices_by_split: dict[str, list[int]] = {}
    for index, response in enumerate(answered):
        indices_by_split.setdefault(prompts[response.prompt_id].set, []).append(index)
    rng = random.Random(seed)
    for indices in indices_by_split.values():
        rng.shuffle(indices)
    sample: list[int] = []
    while len(sample) < min(count, len(answered)):
        sample += [indices.pop() for indices in indices_by_split.values() if indices]
    if out.exists():
        raise UserError("the file exists and may contain labels. Name another file.", code="output-exists", file=out)
    with open_atomically(out) as handle:
        writer = csv.writer(handle)
        writer.writerow(["prompt_id", "sample", "image", "question", "answer", "label"])
        for index in sorted(sample[:count]):
            response = answered[index]
            prompt = prompts[response.prompt_id]
            answer = f"{'' if prompt.prefill is None else f'[{prompt.prefill}]'}{response.text or ''}"
            texts = (prompt.image or "", prompt.conversation, answer)
            writer.writerow(
                [_escape_formula(prompt.id), response.sample, *(_escape_formula(text) for text in texts), ""]
            )
    return len(sample[:count])


def _escape_formula(text: str) -> str:
    """Adds an apostrophe to a text that a spreadsheet would read as a formula."""
    return f"'{text}" if text.lstrip()[:1] in tuple("=+-@\uff1d\uff0b\uff0d\uff20") else text
