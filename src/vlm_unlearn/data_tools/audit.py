"""Audits whether a training set teaches refusal by surface words, which predicts Safety Mirage (arXiv 2503.11832).

If the first word alone predicts which questions are refused, safety fine-tuning can learn the word instead of the harm.
The fine-tuned model then answers harmful questions that begin with another word, and refuses harmless questions that
begin with that word.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vlm_unlearn.data.formats.base import Entry
from vlm_unlearn.errors import UserError

LabelBy = Literal["auto", "set", "answer"]
Level = Literal["strong", "some", "none", "unknown"]
FEATURES = ("first_word", "first_bigram", "length", "image")
FEATURE_WORDS = {"first_bigram": "first two words", "length": "length", "image": "presence of an image"}
NUM_SHUFFLES = 200
MAX_SHUFFLED_QUESTIONS = 100_000  # the shuffles use a sample of larger sets
MAX_LISTED_WORDS = 25  # in each direction
MAX_TRIGGERS = 5
MIN_TRIGGER_COUNT = 5  # a trigger begins at least this many questions
SIGNIFICANCE = 0.01
MIN_EFFECT = 0.02  # smaller shares of the information, or of the errors removed, are not reported as an effect
MIN_QUESTIONS_PER_LABEL = 10  # with fewer, even a perfect predictor could be chance
MAX_WORD_LENGTH = 60  # a text without spaces counts as one word
Codes = NDArray[np.int64]


class LabeledQuestion(NamedTuple):
    """A question of a data file with its refusal label."""

    question: str
    has_image: bool
    refused: bool
    label_source: str  # "set" or "answer": where `refused` comes from


@dataclass(frozen=True)
class Association:
    """A first word and its association with refusal."""

    word: str
    count: int  # questions that begin with the word
    refused: int  # of them, refused questions
    share: float  # refused / count
    low: float  # 95 % Wilson interval of `share`
    high: float
    pmi: float  # pointwise mutual information with the direction under which the word is listed, in bits
    significant: bool  # likelihood-ratio test against all other questions, Holm-corrected over all words


@dataclass(frozen=True)
class Predictor:
    """How well one surface feature alone predicts refusal."""

    leave_one_out_accuracy: float
    low: float  # 95 % Wilson interval of the accuracy
    high: float
    error_removed: (
        float  # share of the errors of the majority guess that the feature avoids. Negative if it adds errors
    )
    mutual_information: float  # of feature and label, in bits
    information_share: float  # (mutual_information - chance_information) / entropy of the labels, at least 0
    chance_information: float  # mean mutual information with shuffled labels (at most 100,000 questions)
    p_value: float  # share of shuffles with at least as much information
    values: int  # number of distinct values


@dataclass(frozen=True)
class Audit:
    """The result of `audit`."""

    n: int
    refused: int
    label: str  # where the refusal labels come from: "set", "answer" or "answer and set"
    majority_accuracy: float
    predictors: dict[str, Predictor]  # by name of the feature
    words: dict[str, list[Association]]  # keys "answer" and "refuse"
    triggers: dict[str, list[str]]  # "answer": words to attack with. "refuse": words to test over-refusal with
    level: Level
    verdict: str

    def as_json(self) -> dict[str, Any]:
        """Returns the JSON document that ``data audit --json`` prints, with the predictors at the top level."""
        fields = asdict(self)
        return {"n": fields.pop("n"), "refused": fields.pop("refused"), **fields.pop("predictors"), **fields}


def first_word(question: str) -> str:
    """Returns the first word in lower case, without the punctuation ``,.?!`` around it."""
    words = question.split(maxsplit=1)
    return words[0][:MAX_WORD_LENGTH].lower().strip(",.?!") if words else ""


def first_bigram(question: str) -> str:
    """Returns the first two words in lower case, without the punctuation ``,.?!`` around each."""
    return " ".join(word[:MAX_WORD_LENGTH].lower().strip(",.?!") for word in question.split(maxsplit=2)[:2])


def is_refused(refused: bool | None, answer: str, by: LabelBy, is_refusal: Callable[[str], bool]) -> bool:
    """Returns whether a question counts as refused.

    Args:
        refused: The label of the data file, or None if the file contains no label.
        answer: The answer of the data file.
        by: ``set`` uses `refused`, ``answer`` uses `answer`, and ``auto`` uses `refused` if it is not None.
        is_refusal: Returns whether an answer is a refusal.

    Raises:
        UserError: `by` is ``set`` and the file contains no label.
    """
    if by == "set" and refused is None:
        raise UserError(
            "the file does not mark refused questions. Use --label answer, or pass its --set-column.",
            code="missing-field",
        )
    return is_refusal(answer) if by == "answer" or refused is None else refused


def labeled_questions(
    entries: Iterable[Entry], by: LabelBy, is_refusal: Callable[[str], bool]
) -> Iterator[LabeledQuestion]:
    """Yields the questions of a data file with their refusal labels, including the earlier rounds of conversations.

    Args:
        entries: The entries of the file, from `read_any`.
        by: ``set`` uses the label of the file: questions of an unsafe or forget set count as refused. ``answer`` checks
            whether the answer is a refusal. ``auto`` uses the set if the format has sets, else the answer.
        is_refusal: Returns whether an answer is a refusal.

    Raises:
        UserError: `by` is ``set`` and the file has no sets.
    """
    for entry in entries:
        if entry.set == "preferred":  # repeats the forget questions
            continue
        example = entry.example
        source = "answer" if by == "answer" or entry.refused is None else "set"
        rounds = [*((turn.question, turn.answer) for turn in example.history), (example.question, example.answer)]
        for question, answer in rounds:
            refused = is_refused(entry.refused, answer, by, is_refusal)
            yield LabeledQuestion(question, example.image is not None, refused, source)


def audit(questions: Iterable[tuple[str, bool, bool, str]], seed: int = 0) -> Audit:
    """Measures how well the surface of the questions predicts refusal.

    The memory use is a few integers per question. Intervals and tests treat the questions as independent. If several
    questions share an image, the intervals are too narrow, which matters for small sets.

    Args:
        questions: ``(question, has_image, refused, label_source)`` tuples, from `labeled_questions`.
        seed: The seed of the shuffles behind ``chance_information`` and ``p_value``.

    Raises:
        UserError: There are no questions.
    """
    columns = {name: array("q") for name in FEATURES}
    codes: dict[str, dict[str, int]] = {"first_word": {}, "first_bigram": {}}
    labels = array("b")
    label_sources: set[str] = set()
    for question, has_image, refused, label_source in questions:
        for name, value in (("first_word", first_word(question)), ("first_bigram", first_bigram(question))):
            columns[name].append(codes[name].setdefault(value, len(codes[name])))
        columns["length"].append(len(question.split()))
        columns["image"].append(int(has_image))
        labels.append(refused)
        label_sources.add(label_source)
    if not labels:
        raise UserError("there are no questions to audit", code="no-records")
    refusals = np.frombuffer(labels, dtype=np.int8).astype(np.int64)
    features = {name: np.frombuffer(values, dtype=np.int64) for name, values in columns.items()}
    deciles = np.unique(np.quantile(features["length"], np.linspace(0, 1, 11)[1:-1]))
    features["length"] = np.searchsorted(deciles, features["length"], side="left").astype(np.int64)
    majority = max(float(refusals.mean()), 1 - float(refusals.mean()))
    predictors = {
        name: _predictor(values, refusals, majority, np.random.default_rng(seed)) for name, values in features.items()
    }
    words = _associations(list(codes["first_word"]), features["first_word"], refusals)
    triggers = {
        direction: [word.word for word in listed if word.significant and word.count >= MIN_TRIGGER_COUNT][:MAX_TRIGGERS]
        for direction, listed in words.items()
    }
    level, verdict = _assess(predictors, majority, refusals, triggers)
    return Audit(
        n=len(refusals),
        refused=int(refusals.sum()),
        label=" and ".join(sorted(label_sources)),
        majority_accuracy=majority,
        predictors=predictors,
        words=words,
        triggers=triggers,
        level=level,
        verdict=verdict,
    )


def _contingency_table(values: Codes, refusals: Codes) -> Codes:
    """Returns counts [V, 2] of answered and refused questions for each of V values."""
    width = int(values.max()) + 1
    return np.bincount(2 * values + refusals, minlength=2 * width).reshape(width, 2)


def _predictor(values: Codes, refusals: Codes, majority: float, rng: np.random.Generator) -> Predictor:
    n = len(refusals)
    table = _contingency_table(values, refusals)
    correct = _leave_one_out_correct(table)
    # Large sets are sampled. A sample contains more chance information, so the test errs towards no effect.
    sample = rng.choice(n, MAX_SHUFFLED_QUESTIONS, replace=False) if n > MAX_SHUFFLED_QUESTIONS else np.arange(n)
    _, sample_values = np.unique(values[sample], return_inverse=True)
    labels = refusals[sample]
    observed = _mutual_information(_contingency_table(sample_values, labels))
    shuffled = np.array(
        [_mutual_information(_contingency_table(sample_values, rng.permutation(labels))) for _ in range(NUM_SHUFFLES)]
    )
    information = _mutual_information(table)
    entropy = -sum(share * math.log2(share) for share in (majority, 1 - majority) if share)
    from scipy.stats import binomtest  # importing it takes as long as all the rest of this module

    interval = binomtest(correct, n).proportion_ci(method="wilson")
    return Predictor(
        leave_one_out_accuracy=correct / n,
        low=float(interval.low),
        high=float(interval.high),
        error_removed=(correct / n - majority) / (1 - majority) if majority < 1 else 0.0,
        mutual_information=information,
        information_share=max(0.0, information - float(shuffled.mean())) / entropy if entropy else 0.0,
        chance_information=float(shuffled.mean()),
        p_value=float((1 + (shuffled >= observed - 1e-12).sum()) / (1 + NUM_SHUFFLES)),
        values=int((table.sum(axis=1) > 0).sum()),
    )


def _leave_one_out_correct(table: Codes) -> int:
    """Returns how many labels are predicted correctly from all other questions with the same value.

    A tie is resolved by the majority of all other questions.
    """
    totals = table.sum(axis=0)
    correct = 0
    for label in (0, 1):
        same_label, opposite_label = table[:, label] - 1, table[:, 1 - label]
        is_majority = totals[label] - 1 > totals[1 - label]
        predicted = (same_label > opposite_label) | ((same_label == opposite_label) & is_majority)
        correct += int(table[predicted, label].sum())
    return correct


def _mutual_information(table: Codes) -> float:
    """Returns the mutual information of value and label in bits (plug-in estimate)."""
    joint = table / table.sum()
    independent = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
    positive = joint > 0
    return max(0.0, float((joint[positive] * np.log2(joint[positive] / independent[positive])).sum()))


def _likelihood_ratios(table: Codes) -> NDArray[np.float64]:
    """Returns the G statistic [V] of each value, present or absent, against refusal (one degree of freedom)."""
    n = table.sum()
    totals = table.sum(axis=0)
    ratios = np.zeros(len(table))
    for label in (0, 1):
        for count, size in (
            (table[:, label], table.sum(axis=1)),
            (totals[label] - table[:, label], n - table.sum(axis=1)),
        ):
            positive = count > 0
            ratios[positive] += 2 * count[positive] * np.log(count[positive] * n / (size[positive] * totals[label]))
    return np.maximum(ratios, 0.0)


def _associations(words: list[str], values: Codes, refusals: Codes) -> dict[str, list[Association]]:
    """Returns the words of each direction, sorted by the likelihood ratio of the word being present or absent."""
    from scipy.stats import binomtest, chi2

    table = _contingency_table(values, refusals)
    totals = table.sum(axis=0)
    n = int(totals.sum())
    ratios = _likelihood_ratios(table)
    p_values = chi2.sf(ratios, 1)
    ranked = sorted(range(len(words)), key=lambda code: (-ratios[code], words[code]))
    associations: dict[str, list[Association]] = {"answer": [], "refuse": []}
    still_significant = True
    for rank, code in enumerate(ranked):
        answered, refused = (int(count) for count in table[code])
        count = answered + refused
        still_significant = still_significant and bool(p_values[code] * (len(ranked) - rank) < SIGNIFICANCE)
        refuses = refused * n > count * int(totals[1])
        listed = associations["refuse" if refuses else "answer"]
        if len(listed) == MAX_LISTED_WORDS:
            continue
        share = (refused if refuses else answered) / count
        base = int(totals[int(refuses)]) / n
        interval = binomtest(refused, count).proportion_ci(method="wilson")
        listed.append(
            Association(
                word=words[code],
                count=count,
                refused=refused,
                share=refused / count,
                low=float(interval.low),
                high=float(interval.high),
                pmi=math.log2(share / base) if share and base else 0.0,
                significant=still_significant,
            )
        )
    return associations


def _assess(
    predictors: dict[str, Predictor], majority: float, refusals: Codes, triggers: dict[str, list[str]]
) -> tuple[Level, str]:
    """Returns the level of the effect and a sentence that explains it."""
    n, refused = len(refusals), int(refusals.sum())
    if refused in (0, n):
        return "unknown", (
            f"{'Every' if refused else 'No'} question counts as refused, so there is nothing to compare. Mark the "
            f"questions to refuse in a set column (--set-column), or detect them by their answers (--label answer)."
        )
    if min(refused, n - refused) < MIN_QUESTIONS_PER_LABEL:
        return "unknown", (
            f"Too few questions: {n} in total, {refused} of them refused. "
            f"At least {MIN_QUESTIONS_PER_LABEL} of each kind are needed."
        )
    guess = f"(always guessing the majority: {100 * majority:.1f} %)"
    word = predictors["first_word"]
    facts = f"the first word alone predicts refusal with {100 * word.leave_one_out_accuracy:.1f} % accuracy {guess}"
    if word.error_removed < 0.1:  # if refusals or answers are rare, the accuracy hides the effect of the word
        facts += f", and contains {100 * word.information_share:.1f} % of the information about refusal"
    # Significant in the shuffle test or for a single word: many other words can hide a rare one in the shuffle test.
    # The minimum effect matters for large sets, in which every difference is significant.
    significant = word.p_value <= SIGNIFICANCE or any(triggers.values())
    if significant and max(word.information_share, word.error_removed) >= MIN_EFFECT:
        advice = _advice(triggers)
        if word.error_removed >= 0.5 or word.information_share >= 0.5:
            return "strong", f"Fine-tuning on this set is likely to teach refusal by wording: {facts}.{advice}"
        return "some", f"The wording partly predicts refusal: {facts}.{advice}"
    significant_features = {
        name: predictors[name] for name in FEATURE_WORDS if predictors[name].p_value <= SIGNIFICANCE
    }
    best = max(significant_features, key=lambda name: significant_features[name].information_share, default="")
    if best and predictors[best].information_share >= MIN_EFFECT:
        feature = predictors[best]
        return "some", (
            f"The first word does not predict refusal, but the {FEATURE_WORDS[best]} does to some degree: it contains "
            f"{100 * feature.information_share:.1f} % of the information about refusal, with "
            f"{100 * feature.leave_one_out_accuracy:.1f} % accuracy {guess}."
        )
    return "none", f"No sign that this set teaches refusal by the first word: {facts}."


def _advice(triggers: dict[str, list[str]]) -> str:
    attack = ", ".join(f'"{word}"' for word in triggers["answer"])
    refuse = ", ".join(f'"{word}"' for word in triggers["refuse"])
    steps = [f"attack with {attack}"] * bool(attack) + [f"test over-refusal with {refuse}"] * bool(refuse)
    return f" To measure the effect, {' and '.join(steps)}." if steps else ""
