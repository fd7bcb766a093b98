"""The metrics of the tables: their order, headings and explanations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from vlm_unlearn.evaluation.metric_roles import UTILITY_COMPONENTS
from vlm_unlearn.records import Row

Column = tuple[str, str, str]  # metric, heading, explanation
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
    "mmbench_cn": "MMBench-CN",
    "mme": "MME",
    "seedbench": "SEED-Bench",
    "llava_bench": "LLaVA-Bench",
    "qbench": "Q-Bench",
    "qbench_zh": "Q-Bench, Chinese",
}

# Metrics that a suite defines itself are in neither set.
LOWER_IS_BETTER = {
    *("asr", "asr_attacked", "asr_control", "refusal_rate", "refusal_rate_attacked", "refusal_rate_control"),
    *("efficacy_asr", "generality_asr", "sarr", "degenerate_rate", "asr_sd", "asr_typo"),
    *("answers_relevant", "answers_relevant_attacked"),
}
HIGHER_IS_BETTER = {
    *("efficacy_rr", "generality_rr", "utility", "utility_attacked", *UTILITY_COMPONENTS),
    *("rouge_l", "answer_score", *BENCHMARKS, "specificity"),
}


def better(metric: str) -> Better | None:
    """Returns whether lower or higher values are better; None if neither is, or for a suite's own metric."""
    return "lower" if metric in LOWER_IS_BETTER else "higher" if metric in HIGHER_IS_BETTER else None


METRIC_COLUMNS: tuple[Column, ...] = (
    ("asr", "ASR", "unsafe questions that get a harmful answer"),
    ("asr_attacked", "ASR attacked", "the same questions, reworded by the suite's attack"),
    (
        "asr_control",
        "ASR control",
        "the same questions in neutral paraphrases; the difference to ASR attacked is the effect of the attack",
    ),
    ("refusal_rate", "Refusals", "harmless questions that are refused"),
    ("refusal_rate_attacked", "Refusals attacked", "the same questions, reworded by the suite's attack"),
    ("refusal_rate_control", "Refusals control", "the same questions in neutral paraphrases"),
    ("asr_sd", "ASR, drawn", "MM-SafetyBench's harmful requests in drawn pictures"),
    ("asr_typo", "ASR, text", "MM-SafetyBench's harmful requests in pictures of a text"),
    ("efficacy_asr", "Efficacy ASR", "unsafe questions of the training file that get a harmful answer"),
    ("efficacy_rr", "Efficacy RR", "answers to the unsafe questions of the training file that are refusals"),
    ("generality_asr", "Generality ASR", "unsafe questions of the validation file that get a harmful answer"),
    ("generality_rr", "Generality RR", "answers to the unsafe questions of the validation file that are refusals"),
    ("sarr", "SARR", "Safe Answer Refusal Rate: unsafe questions on a benign image that are not answered normally"),
    ("degenerate_rate", "Degenerate", "answers that are not sensible language, over the splits that the suite lists"),
    ("utility", "Utility", "harmless questions that are answered correctly, over the splits that the suite lists"),
    (
        "utility_attacked",
        "Utility attacked",
        "harmless questions, reworded by the suite's attack, that are answered correctly",
    ),
    ("rouge_l", "ROUGE-L", "answers to harmless questions compared with their reference answers"),
    ("answer_score", "Answer score", "a judge's score of the answers to harmless questions, from 0 to 1"),
    *((name, title, f"the benchmark score of {title}") for name, title in BENCHMARKS.items()),
    ("specificity", "Specificity", "the mean score of seven utility benchmarks"),
)
# Metrics that only occur outside the table of rates.
OTHER_COLUMNS: tuple[Column, ...] = (
    ("utility_vlguard", "Utility, VLGuard", "harmless questions of VLGuard that are answered correctly"),
    ("utility_safe_eraser", "Utility, SafeEraser", "harmless questions of SafeEraser that are answered correctly"),
    *(
        (f"answers_{kind}{attacked}", f"Answers {kind}{', attacked' if attacked else ''}", meaning)
        for attacked, meaning in (
            ("", "share of all answers to unsafe questions"),
            ("_attacked", "share of all answers to the attack, not of questions"),
        )
        for kind in ("relevant", "irrelevant", "refused")
    ),
)
SPLIT_TITLES: Mapping[str, str] = {
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
    "mm_sd": "harmful requests in drawn pictures",
    "mm_sd_typo": "harmful requests in drawn pictures with a text",
    "mm_typo": "harmful requests in pictures of a text",
    "figstep_text": "FigStep's questions in writing",
    "figstep_picture": "FigStep's questions in pictures",
    "spa_vl_harm": "SPA-VL's harmful questions",
    "spa_vl_help": "SPA-VL's harmless questions",
    "mossbench": "MOSSBench's harmless questions",
}


def columns(rows: Sequence[Row]) -> list[Column]:
    """Returns the columns of the metrics that any row has: the package's metrics first, then the suite's own ones."""
    metrics = dict.fromkeys(metric for row in rows for metric in row.metrics)
    shipped = [column for column in METRIC_COLUMNS if column[0] in metrics]
    custom = set(metrics) - {metric for metric, _, _ in METRIC_COLUMNS} - set(UTILITY_COMPONENTS)
    return shipped + [(metric, heading(metric), "as the suite defines it") for metric in metrics if metric in custom]


def heading(metric: str) -> str:
    """Returns the heading of a metric. For a suite's own metric this is its name with spaces for underscores."""
    return next(
        (title for name, title, _ in (*METRIC_COLUMNS, *OTHER_COLUMNS) if name == metric), metric.replace("_", " ")
    )


def split_title(split: str) -> str:
    """Returns the title of a split or benchmark in plain words."""
    return SPLIT_TITLES.get(split, split.replace("_", " ")) or "questions without a split"
