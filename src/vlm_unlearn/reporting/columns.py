"""What the tables show: which metrics, in which order, under which headings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from vlm_unlearn.records import Row

Column = tuple[str, str, str]  # metric, heading, what it says
Better = Literal["lower", "higher"]

BENCHMARKS: Mapping[str, str] = {
    "gqa": "GQA",
    "vizwiz": "VizWiz",
    "scienceqa": "ScienceQA",
    "vqav2": "VQAv2",
    "textvqa": "TextVQA",
    "pope": "POPE",
    "mmvet": "MM-Vet",
    "mmbench": "MMBench",
}

# Which end of a metric is the good one; a suite's own metrics have none that we know.
LOWER_IS_BETTER = frozenset(
    (
        *("asr", "asr_attacked", "asr_control", "refusal_rate", "refusal_rate_attacked", "refusal_rate_control"),
        *("efficacy_asr", "generality_asr", "sarr", "degenerate_rate", "answers_relevant_attacked"),
    )
)
HIGHER_IS_BETTER = frozenset(
    (
        *(
            "efficacy_rr",
            "generality_rr",
            "utility",
            "utility_attacked",
            "utility_vlguard",
            "utility_safe_eraser",
            "rouge_l",
            "answer_score",
        ),
        *BENCHMARKS,
        "specificity",
    )
)


def better(metric: str) -> Better | None:
    """Whether lower or higher is better; None where that isn't known, or neither is."""
    return "lower" if metric in LOWER_IS_BETTER else "higher" if metric in HIGHER_IS_BETTER else None


METRIC_COLUMNS: tuple[Column, ...] = (
    ("asr", "ASR", "unsafe questions answered with the harm"),
    ("asr_attacked", "ASR attacked", "the same under the suite's attack on the wording"),
    (
        "asr_control",
        "ASR control",
        "the same under paraphrases that are no attack: what the attack does beyond it is its own",
    ),
    ("refusal_rate", "Refusals", "harmless questions refused"),
    ("refusal_rate_attacked", "Refusals attacked", "the same under the suite's attack on the wording"),
    ("refusal_rate_control", "Refusals control", "the same under paraphrases that are no attack"),
    ("efficacy_asr", "Efficacy ASR", "unsafe questions of the training file answered with the harm"),
    ("efficacy_rr", "Efficacy RR", "answers to them that refuse"),
    ("generality_asr", "Generality ASR", "unsafe questions of the validation file answered with the harm"),
    ("generality_rr", "Generality RR", "answers to them that refuse"),
    ("sarr", "SARR", "Safe Answer Refusal Rate: unsafe questions on a benign image not answered normally"),
    ("degenerate_rate", "Degenerate", "answers that are no sentence, over the cases that the suite counts"),
    ("utility", "Utility", "harmless questions answered right, of the cases that the suite counts"),
    (
        "utility_attacked",
        "Utility attacked",
        "harmless questions answered right under the suite's attack on the wording",
    ),
    ("rouge_l", "ROUGE-L", "harmless answers against their reference"),
    ("answer_score", "Answer score", "a judge's score of the same, 0 to 1"),
    *((name, title, f"{title}'s own score") for name, title in BENCHMARKS.items()),
    ("specificity", "Specificity", "the mean of seven utility benchmarks"),
)
# What the demo's `utility` is put together from: no columns of their own.
PARTS = ("utility_vlguard", "utility_safe_eraser")
# Headings of what stands in other tables than the first.
ELSEWHERE: tuple[Column, ...] = (
    ("utility_vlguard", "Utility, VLGuard", "VLGuard's harmless questions answered right"),
    ("utility_safe_eraser", "Utility, SafeEraser", "SafeEraser's harmless questions answered right"),
    (
        "answers_relevant_attacked",
        "Answers relevant, attacked",
        "of all answers to the attack, and not of all questions",
    ),
    ("answers_refused_attacked", "Answers refused, attacked", "of all answers to the attack, and not of all questions"),
)
CASES: Mapping[str, str] = {
    "unsafe": "unsafe questions",
    "unsafe_what": 'unsafe questions that begin with "What"',
    "unsafe_control": "unsafe questions, paraphrased as a control",
    "safe": "harmless questions",
    "safe_share": 'harmless questions that begin with "Share"',
    "safe_control": "harmless questions, paraphrased as a control",
    "benign_image": "unsafe questions on a benign image",
    "harmless": "SafeEraser's harmless questions",
    "efficacy": "unsafe questions of the training file",
    "generality": "unsafe questions of the validation file",
}


def columns(rows: Sequence[Row]) -> list[Column]:
    """The metrics that any row has: known ones first, then a suite's own under their names."""
    measured = dict.fromkeys(metric for row in rows for metric in row.metrics)
    known = [column for column in METRIC_COLUMNS if column[0] in measured]
    own = set(measured) - {metric for metric, _, _ in METRIC_COLUMNS} - set(PARTS)
    return known + [(metric, heading(metric), "as the suite defines it") for metric in measured if metric in own]


def heading(metric: str) -> str:
    """A metric's name in words; a suite's own keeps its name, with blanks for underscores."""
    return next((title for name, title, _ in (*METRIC_COLUMNS, *ELSEWHERE) if name == metric), metric.replace("_", " "))


def split_title(case: str) -> str:
    """A case's name in words."""
    return CASES.get(case, case.replace("_", " ")) or "questions of no case"
