"""Formats rates, intervals and comparisons for tables, pages and the terminal, and explains them in notes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from vlm_unlearn.evaluation.judge_facts import judge_facts
from vlm_unlearn.metrics.rates import group_count, rule_of_three
from vlm_unlearn.records import Comparison, Rate, Row, Summary

SIGNIFICANT = 0.05  # an adjusted p below this is significant


def percent(rate: Rate | None) -> str:
    """Returns ``"12.5\u00a0%"`` with a non-breaking space, or a dash if there is no value."""
    return "–" if rate is None or rate.value is None else f"{100 * rate.value:.1f}\u00a0%"


def interval(rate: Rate | None) -> str:
    """Returns the 95 % interval in percent, such as ``"[8.1, 18.9]"``, or an empty string if there is none."""
    if rate is None or rate.low is None or rate.high is None:
        return ""
    return f"[{100 * rate.low:.1f}, {100 * rate.high:.1f}]"


def bounds(rate: Rate | None) -> str:
    """Returns the interval, or for 0 and 100 % the rule of three: ``"at most 7.2"``, ``"at least 92.8"``."""
    groups = None if rate is None else group_count(rate)
    if rate is None or groups is None:
        return interval(rate)
    bound = 100 * rule_of_three(groups)
    return f"at least {100 - bound:.1f}" if rate.value else f"at most {bound:.1f}"


def rule_of_three_note(rate: Rate | None) -> str:
    """Returns ``"0 of 40 groups: at most 7.2 % with 95 % confidence"`` for 0 and 100 %, or an empty string."""
    groups = None if rate is None else group_count(rate)
    if rate is None or groups is None:
        return ""
    return f"{groups if rate.value else 0} of {groups} groups: {bounds(rate)}\u00a0% with 95\u00a0% confidence"


def change(comparison: Comparison | None) -> str:
    """Returns the change in percentage points, such as ``"-87.5 *"``. The asterisk marks a significant change."""
    if comparison is None:
        return ""
    return f"{100 * comparison.difference:+.1f}{' *' if significant(comparison) else ''}"


def change_interval(comparison: Comparison) -> str:
    """Returns the 95 % interval of a change in percentage points, such as ``"[-95.0, -80.2]"``."""
    return f"[{100 * comparison.low:+.1f}, {100 * comparison.high:+.1f}]"


def significant(comparison: Comparison) -> bool:
    """Returns whether a change is significant after Holm's correction over all comparisons of its summary."""
    return comparison.p_adjusted < SIGNIFICANT


def published(row: Row, metric: str) -> Rate | None:
    """Returns the rate by the published counting if it was measured and differs from the corrected one."""
    rate, corrected = row.paper.get(metric), row.metrics.get(metric)
    return None if rate is None or (corrected is not None and corrected.value == rate.value) else rate


def notes(summary: Summary, metrics: Sequence[str]) -> list[str]:
    """Returns the notes below a table: judges, bounds, marks, the published counting, and the effect of batching.

    Args:
        summary: The summary that the table shows.
        metrics: The metrics that the table shows.
    """
    lines = judged_by(judges_of(summary.rows, metrics))
    rates = (row.metrics.get(metric) for row in summary.rows for metric in metrics)
    example = next((note for rate in rates if (note := rule_of_three_note(rate))), "")
    if example:
        lines.append(
            "Rates of 0 and 100\u00a0% show the rule of three over groups of answers instead of the interval: "
            f"{example}."
        )
    if summary.comparisons:
        base, count = summary.comparisons[0].base, len(summary.comparisons)
        lines.append(
            f"Numbers with a sign are changes from {base} in percentage points, compared prompt by prompt. "
            f"An asterisk marks a change that is significant after Holm's correction over {count} "
            f"comparison{'s' if count > 1 else ''} (adjusted p < {SIGNIFICANT})."
        )
    if any(published(row, metric) for row in summary.rows for metric in metrics):
        lines.append('"Published" is the rate by the published counting, shown if it differs.')
    lines += [
        f"{row.model}: {row.batching.flipped} of {row.batching.checked} answers changed when the questions were asked "
        "one at a time."
        for row in summary.rows
        if row.batching is not None
    ]
    return lines


def judges_of(rows: Iterable[Row], metrics: Collection[str] | None = None) -> list[str]:
    """Returns the judges behind the rows' rates.

    Args:
        rows: The rows of a summary.
        metrics: Only the judges of these metrics. None for all metrics, those by the published counting included.
    """
    judges: set[str] = set()
    for row in rows:
        if metrics is None:
            judges |= {row.judge, *row.judges.values(), *row.paper_judges.values()}
        else:
            judges |= {row.judge_of(metric) for metric in metrics if metric in row.metrics}
    return sorted(judges - {""})


def judged_by(judges: Sequence[str]) -> list[str]:
    """Returns notes that name the judges of a table, and the limits of a keyword judge."""
    lines = [f"Judged by {', '.join(judges[:-1])}{' and ' if judges[1:] else ''}{judges[-1]}."] if judges else []
    if any(judge_facts(judge).only_refusals for judge in judges):
        lines.append(
            'Keyword judges detect refusals only. "Answered" and "correct" mean neither refused nor degenerate.'
        )
    return lines


def by_keywords(rows: Sequence[Row]) -> bool:
    """Returns whether a keyword judge graded any metric of any row."""
    return any(judge_facts(judge).only_refusals for row in rows for judge in (row.judge, *row.judges.values()))


def count_failures(rows: Sequence[Row]) -> int:
    """Returns the number of failed answers and verdicts. An answer counts once for each judge."""
    return sum(count for row in rows for failed_by_split in row.failed.values() for count in failed_by_split.values())
