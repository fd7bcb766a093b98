"""Compares judges with each other and with people's labels, on one run's answers."""

from __future__ import annotations

import csv
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlm_unlearn.errors import UserError, nearest, quoted
from vlm_unlearn.evaluation.generate import read_answers
from vlm_unlearn.metrics.agreement import hit_rates, kappa_rate
from vlm_unlearn.records import LABELS, Kappa, Prompt, Rate, Record, Verdict
from vlm_unlearn.store import open_atomically, read_records

HUMAN = "human"
POSITIVE_SCORE = 0.5  # a judge that gives scores only says yes from here on
Key = tuple[str, int]


class Agreement(Record):
    """A judge against a reference, on the answers that both have graded."""

    reference: str
    judge: str
    kappa: Kappa | None  # over all labels; None where one of the two gives scores only
    kappa_positive: Kappa  # the positive label against the rest
    true_positive_rate: Rate
    true_negative_rate: Rate


@dataclass(frozen=True)
class Grades:
    """One grader's verdicts by answer: labels, or yes and no where it gives scores only. A failed verdict is None."""

    name: str
    labels: Mapping[Key, str | None]
    scores_only: bool = False

    def positive(self, key: Key, label: str) -> bool:
        return self.labels[key] == ("yes" if self.scores_only else label)


def agreement(run: Path, judges: Sequence[str], human: Path | None, positive: str) -> list[Agreement]:
    """Every judge against people's labels, or against the first judge where there are none.

    Args:
        judges: names of verdict files; none is all that the run has.
        positive: the label that is looked for; a judge that gives scores only is read as yes at 0.5 or more.

    Raises:
        UserError: a judge has not graded the run, there are fewer than two graders, or the CSV is broken.
    """
    if positive not in LABELS:
        raise UserError(
            f"--positive {quoted(positive)}: is no label{nearest(positive, LABELS)}; labels: {', '.join(LABELS)}"
        )
    prompts, responses = read_answers(run)
    keys = {response.key for response in responses}
    there = {
        file.name.removeprefix("verdicts-").removesuffix(".jsonl"): file
        for file in sorted(run.glob("verdicts-*.jsonl"))
    }
    for judge in dict.fromkeys(judges):
        if judge not in there:
            raise UserError(
                f"{run}: no verdicts of {quoted(judge)}{nearest(judge, there)}; there are {', '.join(there) or 'none'}"
            )
    graders = [_judge_grades(there[judge], judge, keys) for judge in dict.fromkeys(judges or there)]
    if human is not None:
        graders.insert(0, _human_grades(human, keys))
    if len(graders) < 2:
        raise UserError(f"{run}: one grader agrees with nobody; judge with another one, or pass --human LABELS.csv")
    reference, *others = graders
    return [_compare(reference, other, prompts, positive) for other in others]


def _compare(reference: Grades, judge: Grades, prompts: Mapping[str, Prompt], positive: str) -> Agreement:
    shared = [key for key in reference.labels if key in judge.labels]
    if not shared:
        raise UserError(f"{reference.name} and {judge.name} have graded no answer both")
    told = [key for key in shared if reference.labels[key] is not None and judge.labels[key] is not None]
    failed = len(shared) - len(told)
    clusters = [prompts[id].group_id for id, _ in told]
    whole = None
    if not (reference.scores_only or judge.scores_only):
        whole = kappa_rate([(str(reference.labels[key]), str(judge.labels[key])) for key in told], clusters, failed)
    yes = [(reference.positive(key, positive), judge.positive(key, positive)) for key in told]
    sensitivity, specificity = hit_rates(yes, clusters, failed)
    return Agreement(
        reference=reference.name,
        judge=judge.name,
        kappa=whole,
        kappa_positive=kappa_rate([(str(one), str(other)) for one, other in yes], clusters, failed),
        true_positive_rate=sensitivity,
        true_negative_rate=specificity,
    )


def _judge_grades(file: Path, name: str, keys: Collection[Key]) -> Grades:
    verdicts = [verdict for verdict in read_records(file, Verdict) if verdict.key in keys]
    if any(verdict.label is not None for verdict in verdicts):
        return Grades(name, {verdict.key: verdict.label for verdict in verdicts})
    said = {
        verdict.key: None if verdict.score is None else "yes" if verdict.score >= POSITIVE_SCORE else "no"
        for verdict in verdicts
    }
    return Grades(name, said, scores_only=True)


def _human_grades(file: Path, keys: Collection[Key]) -> Grades:
    """A CSV with the columns prompt_id, label and, for several samples, sample; rows without a label are passed over."""
    labels: dict[Key, str | None] = {}
    try:
        with file.open(encoding="utf-8-sig", newline="") as handle:
            for number, row in enumerate(csv.DictReader(handle), start=2):
                where = f"{file}: row {number}"
                if row.get("prompt_id") is None or row.get("label") is None:
                    raise UserError(f"{where}: needs the columns prompt_id and label")
                id = row["prompt_id"]
                id = id[1:] if id.startswith("'") and (id, 0) not in keys else id  # as `write_sheet` guards it
                label = row["label"].strip().lower().replace(" ", "_")
                if not label:
                    continue
                if label not in LABELS:
                    raise UserError(
                        f"{where}: {quoted(row['label'])} is no label{nearest(label, LABELS)}; labels: {', '.join(LABELS)}"
                    )
                sample = (row.get("sample") or "0").strip()
                if not sample.isdecimal() or len(sample) > 9:
                    raise UserError(f"{where}: sample {quoted(sample)} is no number")
                if (id, int(sample)) not in keys:
                    raise UserError(f"{where}: the run has no answer {int(sample)} to a prompt {quoted(id)}")
                if labels.setdefault((id, int(sample)), label) != label:
                    raise UserError(f"{where}: the same answer has two labels")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file}: {getattr(error, 'strerror', None) or 'is not a CSV file in UTF-8'}") from None
    if not labels:
        raise UserError(f"{file}: holds no labels")
    return Grades(HUMAN, labels)


def write_sheet(run: Path, out: Path, count: int, seed: int) -> int:
    """Writes a CSV of answers for people to label, drawn at random over the run's cases in equal shares; returns how many."""
    prompts, responses = read_answers(run)
    answered = [response for response in responses if response.text is not None]
    by_case: dict[str, list[int]] = {}
    for number, response in enumerate(answered):
        by_case.setdefault(prompts[response.prompt_id].set, []).append(number)
    rng = random.Random(seed)
    for numbers in by_case.values():
        rng.shuffle(numbers)
    drawn: list[int] = []
    while len(drawn) < min(count, len(answered)):
        drawn += [numbers.pop() for numbers in by_case.values() if numbers]
    if out.exists():
        raise UserError(f"{out}: is there already, perhaps with labels; name another file")
    with open_atomically(out) as handle:
        sheet = csv.writer(handle)
        sheet.writerow(["prompt_id", "sample", "image", "question", "answer", "label"])
        for number in sorted(drawn[:count]):
            response = answered[number]
            prompt = prompts[response.prompt_id]
            texts = (prompt.image or "", prompt.question, response.text or "")
            sheet.writerow([_cell(prompt.id), response.sample, *map(_cell, texts), ""])
    return len(drawn[:count])


def _cell(text: str) -> str:
    """Text that a spreadsheet takes for text and not for a formula."""
    return f"'{text}" if text.lstrip()[:1] in tuple("=+-@\uff1d\uff0b\uff0d\uff20") else text
