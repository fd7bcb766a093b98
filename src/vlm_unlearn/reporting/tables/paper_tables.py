"""The tables of the two papers, in their shapes: columns that were not measured are left out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from vlm_unlearn.evaluation.benchmarks import SPECIFICITY
from vlm_unlearn.records import LABELS, Rate, Row, Summary
from vlm_unlearn.reporting.columns import heading
from vlm_unlearn.reporting.formatting import judged_by, judges_of
from vlm_unlearn.reporting.tables.table import Cell, Column, Table, counts, rate_cell, rate_column, word, words

ATTACKED_CASE = "unsafe_what"  # the shipped suites' name of the attack on unsafe questions
Shape = Sequence[tuple[str, str, str]]  # metric, heading, group
BENCHMARKS = ("vqav2", "textvqa", "vizwiz", "gqa", "scienceqa", "pope", "mmvet", "mmbench")  # in the papers' order
UTILITY: Shape = tuple((metric, heading(metric), "") for metric in ("utility", "utility_attacked", *BENCHMARKS))
SAFETY_MIRAGE: Shape = (
    ("asr", "before", "ASR"),
    ("asr_attacked", "after", "ASR"),
    ("refusal_rate", "before", "RR"),
    ("refusal_rate_attacked", "after", "RR"),
    *UTILITY,
)
SAFE_ERASER: Shape = (
    ("efficacy_asr", "ASR", "Efficacy"),
    ("efficacy_rr", "RR", "Efficacy"),
    ("generality_asr", "ASR", "Generality"),
    ("generality_rr", "RR", "Generality"),
    ("sarr", "SARR", ""),
    ("rouge_l", "ROUGE-L", ""),
    ("answer_score", "Score", ""),
    ("specificity", "mean", "Specificity"),
    *((metric, heading(metric), "Specificity") for metric in BENCHMARKS if metric in SPECIFICITY),
)


def safety_mirage(summary: Summary) -> Iterable[Table]:
    """ASR and refusals before and after the attack, and utility; once more by the published counting where that was asked for."""
    title = "Attack success rate (ASR) on unsafe questions and refusal rate (RR) on harmless ones before and after the one-word attack, in %."
    yield from _both("safety_mirage", title, summary, SAFETY_MIRAGE, ("asr", "asr_attacked"))


def safe_eraser(summary: Summary) -> Iterable[Table]:
    """Efficacy, generality, SARR, quality of harmless answers and specificity; once more by the published counting."""
    title = "Forgetting on the training questions (efficacy) and on others (generality), over-forgetting (SARR) and what is kept, in %."
    yield from _both("safe_eraser", title, summary, SAFE_ERASER, ("efficacy_asr",))


def safety_mirage_answers(summary: Summary) -> Iterable[Table]:
    """Where the answers to the attack went, counted over all answers and not over questions."""
    rows = [row for row in summary.rows if sum(row.labels.get(ATTACKED_CASE, {}).values())]
    if rows:
        columns = [Column(label, label.replace("_", " ")) for label in (*LABELS, "failed")]
        lines = [[word("model", row.model), *shares(row.labels[ATTACKED_CASE])] for row in rows]
        title = "Where the answers to the attack on unsafe questions went, in % of all answers."
        behind = counts("Answers: ", {"each model": [sum(row.labels[ATTACKED_CASE].values()) for row in rows]})
        notes = (*judged_by(own_judges(rows)), f"{behind}.")
        yield Table("safety_mirage_answers", title, [*words("model"), *columns], lines, "label", notes)


def own_judges(rows: Iterable[Row]) -> list[str]:
    """The judges who gave rows their labels."""
    return sorted({row.judge for row in rows if row.judge})


def shares(labels: dict[str, int]) -> list[Cell]:
    """One cell a label, in percent of all answers of the case, those that failed included.

    They have no interval: a question's answers are not independent, and the labels alone don't tell how far.
    """
    total = sum(labels.values())
    counted = {label: labels.get(label, 0) for label in (*LABELS, "failed")}
    return [
        Cell(
            f"{100 * count / total:.1f}" if total else "0.0",
            {"answers": count, "share": count / total if total else None},
        )
        for count in counted.values()
    ]


def told(rows: Sequence[Row], names: Sequence[tuple[str, str]]) -> list[str]:
    """How many answers or questions the rates rest on, and how many failed.

    Args:
        names: metrics with what to call them.
    """
    found: dict[str, list[Rate]] = {}
    for metric, title in names:
        rates = [row.metrics[metric] for row in rows if metric in row.metrics]
        if rates:
            found[title] = rates
    return counted(found, found)


def counted(found: Mapping[str, Sequence[Rate]], whole: Mapping[str, Sequence[Rate]]) -> list[str]:
    """How many answers or questions rates rest on, and how many failed.

    Args:
        found: what to call a metric -> its rates.
        whole: the same, of rates that leave no failure out and count none twice.
    """
    rates = {title: of_metric for title, of_metric in found.items() if of_metric}
    if not rates:
        return []
    return [
        f"{counts('n = ', {title: [rate.n for rate in of_metric] for title, of_metric in rates.items()})}.",
        *failed_of(whole),
    ]


def failed_of(found: Mapping[str, Sequence[Rate]]) -> list[str]:
    """How many answers or verdicts failed; arguments as in `counted`."""
    failed = {
        title: [sum(rate.failed for rate in rates)]
        for title, rates in found.items()
        if any(rate.failed for rate in rates)
    }
    return [f"{counts('Answers or verdicts that failed, over all models: ', failed)}." if failed else "None failed."]


def _both(name: str, title: str, summary: Summary, shape: Shape, core: Sequence[str]) -> Iterable[Table]:
    yield from _shaped(name, title, summary.rows, shape, core)
    published = [row.with_published_counting() for row in summary.rows if set(core) <= set(row.paper)]
    yield from _shaped(
        f"{name}_published", f"{title} By the published counting, where that has the metric.", published, shape, core
    )


def _shaped(name: str, title: str, rows: Sequence[Row], shape: Shape, core: Sequence[str]) -> Iterable[Table]:
    """The table, or none where no model has the metrics of its core."""
    rows = [row for row in rows if set(core) <= set(row.metrics)]
    used = [(metric, heading, group) for metric, heading, group in shape if any(metric in row.metrics for row in rows)]
    if rows:
        columns = [rate_column(rows, metric, heading, group) for metric, heading, group in used]
        lines = [
            [word("model", row.model), *(rate_cell(row.metrics.get(metric)) for metric, _, _ in used)] for row in rows
        ]
        named = [(metric, f"{group} {heading}".strip()) for metric, heading, group in used]
        judges = judged_by(judges_of(rows, [metric for metric, _, _ in used]))
        yield Table(name, title, [*words("model"), *columns], lines, "metric", (*judges, *told(rows, named)))
