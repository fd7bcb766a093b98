"""The tables of the two papers, with their columns. Columns that were not measured are omitted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vlm_unlearn.evaluation.benchmarks import SPECIFICITY_BENCHMARKS
from vlm_unlearn.records import LABELS, Row, Summary
from vlm_unlearn.reporting.columns import heading
from vlm_unlearn.reporting.formatting import judged_by, judges_of
from vlm_unlearn.reporting.tables.notes import describe_counts, metric_notes
from vlm_unlearn.reporting.tables.table import Cell, Column, Table, rate_cell, rate_column, text_cell, text_columns

ATTACKED_SPLIT = "unsafe_what"  # the split of attacked unsafe questions in the shipped suites
MetricLayout = Sequence[tuple[str, str, str]]  # metric, heading, group
BENCHMARKS = ("vqav2", "textvqa", "vizwiz", "gqa", "scienceqa", "pope", "mmvet", "mmbench")  # in the papers' order
UTILITY: MetricLayout = tuple((metric, heading(metric), "") for metric in ("utility", "utility_attacked", *BENCHMARKS))
SAFETY_MIRAGE: MetricLayout = (
    ("asr", "before", "ASR"),
    ("asr_attacked", "after", "ASR"),
    ("refusal_rate", "before", "RR"),
    ("refusal_rate_attacked", "after", "RR"),
    *UTILITY,
)
SAFE_ERASER: MetricLayout = (
    ("efficacy_asr", "ASR", "Efficacy"),
    ("efficacy_rr", "RR", "Efficacy"),
    ("generality_asr", "ASR", "Generality"),
    ("generality_rr", "RR", "Generality"),
    ("sarr", "SARR", ""),
    ("rouge_l", "ROUGE-L", ""),
    ("answer_score", "Score", ""),
    ("specificity", "mean", "Specificity"),
    *((metric, heading(metric), "Specificity") for metric in BENCHMARKS if metric in SPECIFICITY_BENCHMARKS),
)


def safety_mirage(summary: Summary) -> Iterable[Table]:
    """Yields the table of ASR, refusals and utility, and again by the published counting if the summary has it."""
    title = (
        "Attack success rate (ASR) on unsafe questions and refusal rate (RR) on harmless questions, before and after "
        "the one-word attack, in %."
    )
    yield from _both_countings("safety_mirage", title, summary, SAFETY_MIRAGE, ("asr", "asr_attacked"))


def safe_eraser(summary: Summary) -> Iterable[Table]:
    """Yields the table of forgetting and utility, and again by the published counting if the summary has it."""
    title = (
        "Forgetting of the training questions (efficacy) and of other questions (generality), over-forgetting (SARR) "
        "and preserved utility, in %."
    )
    yield from _both_countings("safe_eraser", title, summary, SAFE_ERASER, ("efficacy_asr",))


def safety_mirage_answers(summary: Summary) -> Iterable[Table]:
    """Yields the distribution of the labels of all answers to the attack on unsafe questions."""
    rows = [row for row in summary.rows if sum(row.labels.get(ATTACKED_SPLIT, {}).values())]
    if rows:
        columns = [Column(label, label.replace("_", " ")) for label in (*LABELS, "failed")]
        lines = [[text_cell("model", row.model), *label_cells(row.labels[ATTACKED_SPLIT])] for row in rows]
        title = "Labels of the answers to the attacked unsafe questions, in % of all answers."
        sizes = describe_counts("Answers: ", {"each model": [sum(row.labels[ATTACKED_SPLIT].values()) for row in rows]})
        notes = (*judged_by(label_judges(rows)), f"{sizes}.")
        yield Table("safety_mirage_answers", title, [*text_columns("model"), *columns], lines, "label", notes)


def label_judges(rows: Iterable[Row]) -> list[str]:
    """Returns the judges of the label distributions of rows."""
    return sorted({row.judge for row in rows if row.judge})


def label_cells(labels: dict[str, int]) -> list[Cell]:
    """Returns one cell per label, in percent of all answers of a split, including those that failed.

    The cells have no interval. The answers to a question are correlated, and the counts do not tell how strongly.
    """
    total = sum(labels.values())
    counts = [labels.get(label, 0) for label in (*LABELS, "failed")]
    shares = [count / total if total else None for count in counts]
    return [
        Cell(f"{100 * (share or 0.0):.1f}", {"answers": count, "share": share})
        for count, share in zip(counts, shares, strict=True)
    ]


def _both_countings(
    name: str, title: str, summary: Summary, layout: MetricLayout, required: Sequence[str]
) -> Iterable[Table]:
    yield from _paper_table(name, title, summary.rows, layout, required)
    published = [row.with_published_counting() for row in summary.rows if set(required) <= set(row.paper)]
    published_title = f"{title} By the published counting, for the metrics that have one."
    yield from _paper_table(f"{name}_published", published_title, published, layout, required)


def _paper_table(
    name: str, title: str, rows: Sequence[Row], layout: MetricLayout, required: Sequence[str]
) -> Iterable[Table]:
    """Yields the table of the rows that have all required metrics, or nothing if there are none."""
    rows = [row for row in rows if set(required) <= set(row.metrics)]
    used = [(metric, heading, group) for metric, heading, group in layout if any(metric in row.metrics for row in rows)]
    if rows:
        columns = [rate_column(rows, metric, heading, group) for metric, heading, group in used]
        lines = [
            [text_cell("model", row.model), *(rate_cell(row.metrics.get(metric)) for metric, _, _ in used)]
            for row in rows
        ]
        titles = {metric: f"{group} {heading}".strip() for metric, heading, group in used}
        notes = (*judged_by(judges_of(rows, list(titles))), *metric_notes(rows, titles))
        yield Table(name, title, [*text_columns("model"), *columns], lines, "metric", notes)
