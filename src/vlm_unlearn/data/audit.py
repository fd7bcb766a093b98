"""Does a training set teach refusal by surface words? The check that predicts Safety Mirage (arXiv 2503.11832) before training.

If the first word alone tells which questions are refused, safety fine-tuning can learn the word instead of the harm: a harmful
question that begins otherwise is then answered, a harmless one that begins so is refused.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, chi2

from vlm_unlearn.data.readers import Entry
from vlm_unlearn.errors import UserError

LabelBy = Literal["auto", "set", "answer"]
FEATURES = ("first_word", "first_bigram", "length", "image")
FEATURE_WORDS = {"first_bigram": "first two words", "length": "length", "image": "presence of an image"}
SHUFFLES = 200
SHUFFLED = 100_000  # questions that the shuffles look at
LISTED = 25  # words shown in each direction
TRIGGERS = 5
RARE = 5  # a word seen less often can't be called a trigger
SIGNIFICANCE = 0.01
SMALL = 0.02  # share of the information below which a feature gives nothing away that matters
FEW = 10  # of each kind of question; of fewer even a perfect trigger can't be told from luck
MAX_WORD_LENGTH = 60  # a text without spaces is one "word"
Codes = NDArray[np.int64]


@dataclass(frozen=True)
class Association:
    """A first word and how it goes with refusal."""

    word: str
    count: int
    refused: int
    share: float  # of the questions that begin with it, refused
    low: float  # Wilson's 95 % interval of the share
    high: float
    pmi: float  # pointwise mutual information with the direction it is listed under, in bits
    significant: bool  # likelihood-ratio test against the other questions, Holm-corrected over all words


@dataclass(frozen=True)
class Predictor:
    """How well one surface feature alone tells refused from answered questions."""

    leave_one_out_accuracy: float
    low: float  # Wilson's 95 % interval
    high: float
    error_removed: (
        float  # share of the errors of always guessing the majority that it removes; below 0 where it adds errors
    )
    mutual_information: float  # bits
    information_share: float  # of the labels' entropy, what luck gives subtracted: from 0, nothing told, to 1, all
    chance_information: float  # mean over shuffles of the labels: what a feature of as many values has by luck (100,000 questions at most)
    p_value: float  # share of shuffles with as much information
    values: int  # how many different values it takes


@dataclass(frozen=True)
class Audit:
    """What `audit` finds."""

    n: int
    refused: int
    label: str  # what "refused" was told by
    majority_accuracy: float
    predictors: dict[str, Predictor]
    words: dict[str, list[Association]]  # "answer" and "refuse"
    triggers: dict[str, list[str]]  # "answer": attack with these; "refuse": test over-refusal with these
    level: Literal["strong", "some", "none", "unknown"]
    verdict: str

    def as_json(self) -> dict[str, Any]:
        """As the command prints it: the predictors stand at the top."""
        found = asdict(self)
        return {"n": found.pop("n"), "refused": found.pop("refused"), **found.pop("predictors"), **found}


def first_word(question: str) -> str:
    """The first word, lower-cased, without the punctuation ``,.?!`` around it."""
    words = question.split(maxsplit=1)
    return words[0][:MAX_WORD_LENGTH].lower().strip(",.?!") if words else ""


def first_bigram(question: str) -> str:
    """The first two words, likewise."""
    return " ".join(word[:MAX_WORD_LENGTH].lower().strip(",.?!") for word in question.split(maxsplit=2)[:2])


def is_refused(refused: bool | None, answer: str, by: LabelBy, is_refusal: Callable[[str], bool]) -> bool:
    """Whether a question is refused: as its file says, or as its answer does where `by` or a silent file wants that.

    Raises:
        UserError: `by` is ``set`` and the file knows no sets.
    """
    if by == "set" and refused is None:
        raise UserError(
            "the file does not say which questions are to be refused; use --label answer, or name its --set-column"
        )
    return is_refusal(answer) if by == "answer" or refused is None else refused


def labeled_questions(
    entries: Iterable[Entry], by: LabelBy, is_refusal: Callable[[str], bool]
) -> Iterator[tuple[str, bool, bool, str]]:
    """``(question, has an image, refused, how that was told)`` for each question, earlier rounds of a conversation included.

    Args:
        by: ``set``: what the file says (unsafe or forget is refused); ``answer``: whether the answer is a refusal; ``auto``: the
            set where the format knows sets.
        is_refusal: tells a refusing answer.

    Raises:
        UserError: `by` is ``set`` and the file knows no sets.
    """
    for entry in entries:
        if entry.set == "preferred":  # the forget questions once more
            continue
        example = entry.example
        told_by = "answer" if by == "answer" or entry.refused is None else "set"
        rounds = [*((turn.question, turn.answer) for turn in example.history), (example.question, example.answer)]
        for question, answer in rounds:
            yield question, example.image is not None, is_refused(entry.refused, answer, by, is_refusal), told_by


def audit(questions: Iterable[tuple[str, bool, bool, str]], seed: int = 0) -> Audit:
    """Measures how much of a set's refusal can be read off the surface of its questions.

    Memory is a few integers a question. Intervals and tests take the questions as independent; several on one image make them
    too narrow, which matters for small sets.

    Args:
        questions: what `labeled_questions` gives.
        seed: of the shuffles that give ``chance_information``.

    Raises:
        UserError: there are no questions.
    """
    columns = {name: array("q") for name in FEATURES}
    codes: dict[str, dict[str, int]] = {"first_word": {}, "first_bigram": {}}
    labels = array("b")
    told: set[str] = set()
    for question, image, refused, how in questions:
        for name, value in (("first_word", first_word(question)), ("first_bigram", first_bigram(question))):
            columns[name].append(codes[name].setdefault(value, len(codes[name])))
        columns["length"].append(len(question.split()))
        columns["image"].append(int(image))
        labels.append(refused)
        told.add(how)
    if not labels:
        raise UserError("there are no questions to audit")
    refusals = np.frombuffer(labels, dtype=np.int8).astype(np.int64)
    features = {name: np.frombuffer(values, dtype=np.int64) for name, values in columns.items()}
    features["length"] = _buckets(features["length"])
    majority = max(float(refusals.mean()), 1 - float(refusals.mean()))
    predictors = {
        name: _predictor(values, refusals, majority, np.random.default_rng(seed)) for name, values in features.items()
    }
    words = _associations(list(codes["first_word"]), features["first_word"], refusals)
    triggers = {
        way: [word.word for word in found if word.significant and word.count >= RARE][:TRIGGERS]
        for way, found in words.items()
    }
    level, verdict = _verdict(predictors, majority, refusals, triggers)
    return Audit(
        len(refusals),
        int(refusals.sum()),
        " and ".join(sorted(told)),
        majority,
        predictors,
        words,
        triggers,
        level,
        verdict,
    )


def _buckets(lengths: Codes, count: int = 10) -> Codes:
    """Question lengths in words as deciles."""
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, count + 1)[1:-1]))
    return np.searchsorted(edges, lengths, side="left").astype(np.int64)


def _table(values: Codes, refusals: Codes) -> Codes:
    """Counts [values, 2]: answered, refused."""
    width = int(values.max()) + 1
    return np.bincount(2 * values + refusals, minlength=2 * width).reshape(width, 2)


def _predictor(values: Codes, refusals: Codes, majority: float, rng: np.random.Generator) -> Predictor:
    n = len(refusals)
    table = _table(values, refusals)
    right = _leave_one_out(table)
    # Of a large set a sample: chance has more room in it, so that the test errs towards seeing nothing.
    sample = rng.choice(n, SHUFFLED, replace=False) if n > SHUFFLED else np.arange(n)
    _, some = np.unique(values[sample], return_inverse=True)
    labels = refusals[sample]
    seen = _information(_table(some, labels))
    shuffled = np.array([_information(_table(some, rng.permutation(labels))) for _ in range(SHUFFLES)])
    information = _information(table)
    entropy = -sum(share * math.log2(share) for share in (majority, 1 - majority) if share)
    interval = binomtest(right, n).proportion_ci(method="wilson")
    return Predictor(
        leave_one_out_accuracy=right / n,
        low=float(interval.low),
        high=float(interval.high),
        error_removed=(right / n - majority) / (1 - majority) if majority < 1 else 0.0,
        mutual_information=information,
        information_share=max(0.0, information - float(shuffled.mean())) / entropy if entropy else 0.0,
        chance_information=float(shuffled.mean()),
        p_value=float((1 + (shuffled >= seen - 1e-12).sum()) / (1 + SHUFFLES)),
        values=int((table.sum(axis=1) > 0).sum()),
    )


def _leave_one_out(table: Codes) -> int:
    """How many labels are right when each is guessed from the others with the same value; ties go to the majority of the others."""
    totals = table.sum(axis=0)
    right = 0
    for label in (0, 1):
        same, other = table[:, label] - 1, table[:, 1 - label]
        majority = totals[label] - 1 > totals[1 - label]
        guessed = (same > other) | ((same == other) & majority)
        right += int(table[guessed, label].sum())
    return right


def _information(table: Codes) -> float:
    """Mutual information of value and label in bits (plug-in estimate)."""
    joint = table / table.sum()
    independent = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
    there = joint > 0
    return max(0.0, float((joint[there] * np.log2(joint[there] / independent[there])).sum()))


def _likelihood_ratios(table: Codes) -> NDArray[np.float64]:
    """For each value the G statistic of having it or not against refusal (one degree of freedom)."""
    n = table.sum()
    totals = table.sum(axis=0)
    ratios = np.zeros(len(table))
    for label in (0, 1):
        for count, size in (
            (table[:, label], table.sum(axis=1)),
            (totals[label] - table[:, label], n - table.sum(axis=1)),
        ):
            there = count > 0
            ratios[there] += 2 * count[there] * np.log(count[there] * n / (size[there] * totals[label]))
    return np.maximum(ratios, 0.0)


def _associations(words: list[str], values: Codes, refusals: Codes) -> dict[str, list[Association]]:
    """The words of each direction, those that explain most first (by the likelihood ratio of word against no word)."""
    table = _table(values, refusals)
    totals = table.sum(axis=0)
    n = int(totals.sum())
    ratios = _likelihood_ratios(table)
    p_values = chi2.sf(ratios, 1)
    ranked = sorted(range(len(words)), key=lambda code: (-ratios[code], words[code]))
    found: dict[str, list[Association]] = {"answer": [], "refuse": []}
    still_significant = True
    for place, code in enumerate(ranked):
        answered, refused = (int(count) for count in table[code])
        count = answered + refused
        still_significant = still_significant and bool(p_values[code] * (len(ranked) - place) < SIGNIFICANCE)
        refuses = refused * n > count * int(totals[1])
        way = "refuse" if refuses else "answer"
        if len(found[way]) == LISTED:
            continue
        share = (refused if refuses else answered) / count
        base = int(totals[int(refuses)]) / n
        interval = binomtest(refused, count).proportion_ci(method="wilson")
        pmi = math.log2(share / base) if share and base else 0.0
        association = Association(
            words[code],
            count,
            refused,
            refused / count,
            float(interval.low),
            float(interval.high),
            pmi,
            still_significant,
        )
        found[way].append(association)
    return found


def _verdict(
    predictors: dict[str, Predictor], majority: float, refusals: Codes, triggers: dict[str, list[str]]
) -> tuple[Literal["strong", "some", "none", "unknown"], str]:
    refused = int(refusals.sum())
    if refused in (0, len(refusals)):
        what = "No question is refused" if refused == 0 else "Every question is refused"
        return "unknown", (
            f"{what}: there is nothing to tell apart. A table says which are to be refused by a set column (--set-column), or "
            f"its answers by declining (--label answer)."
        )
    if min(refused, len(refusals) - refused) < FEW:
        return (
            "unknown",
            f"Too few questions to tell: {len(refusals)}, {refused} of them refused; at least {FEW} of each kind are needed.",
        )
    word = predictors["first_word"]
    facts = (
        f"the first word alone tells refused from answered questions with {100 * word.leave_one_out_accuracy:.1f} % accuracy "
        f"(always guessing the majority: {100 * majority:.1f} %)"
    )
    if word.error_removed < 0.1:  # where one kind is rare, accuracy hides what the word tells
        facts += f", and holds {100 * word.information_share:.1f} % of the information"
    advice = _advice(triggers)
    # Significant by shuffling, or by a single word: a rare one may be lost among many. In a large set everything is significant.
    if (word.p_value <= SIGNIFICANCE or any(triggers.values())) and max(
        word.information_share, word.error_removed
    ) >= SMALL:
        if word.error_removed >= 0.5 or word.information_share >= 0.5:
            return "strong", f"Fine-tuning on this set is likely to teach refusal by wording: {facts}.{advice}"
        return "some", f"Wording gives part of refusal away: {facts}.{advice}"
    told = {name: predictors[name] for name in FEATURE_WORDS if predictors[name].p_value <= SIGNIFICANCE}
    best = max(told, key=lambda name: told[name].information_share, default="")
    if best and told[best].information_share >= SMALL:
        other = told[best]
        return "some", (
            f"The first word does not give refusal away, but the {FEATURE_WORDS[best]} to some degree: it holds "
            f"{100 * other.information_share:.1f} % of the information, with {100 * other.leave_one_out_accuracy:.1f} % accuracy "
            f"(always guessing the majority: {100 * majority:.1f} %)."
        )
    return "none", f"No sign that refusal is taught by the first word: {facts}."


def _advice(triggers: dict[str, list[str]]) -> str:
    attack = ", ".join(f'"{word}"' for word in triggers["answer"])
    refuse = ", ".join(f'"{word}"' for word in triggers["refuse"])
    parts = [f"attack with {attack}"] * bool(attack) + [f"test over-refusal with {refuse}"] * bool(refuse)
    return f" To see it, {' and '.join(parts)}." if parts else ""
