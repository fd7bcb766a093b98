"""Says in words what the numbers of a summary show, and only what they show."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from vlm_unlearn.metrics.rates import group_count, rule_of_three
from vlm_unlearn.records import Comparison, Rate, Row, Summary

SIGNIFICANT = 0.05


def percent(rate: Rate | None) -> str:
    """``"12.5\u00a0%"``, or a dash where nothing was measured."""
    return (
        "–" if rate is None or rate.value is None else f"{100 * rate.value:.1f}\u00a0%"
    )  # no line break before the sign


def interval(rate: Rate | None) -> str:
    """``"[8.1, 18.9]"`` in percent, or nothing."""
    if rate is None or rate.low is None or rate.high is None:
        return ""
    return f"[{100 * rate.low:.1f}, {100 * rate.high:.1f}]"


def bounds(rate: Rate | None) -> str:
    """The interval, or for 0 and 100 % the rule of three: ``"at most 7.2"``, ``"at least 92.8"``."""
    groups = None if rate is None else group_count(rate)
    if rate is None or groups is None:
        return interval(rate)
    bound = 100 * rule_of_three(groups)
    return f"at least {100 - bound:.1f}" if rate.value else f"at most {bound:.1f}"


def rule_of_three_note(rate: Rate | None) -> str:
    """``"0 of 40 groups: at most 7.2 % with 95 % confidence"`` for 0 and 100 %, or nothing."""
    groups = None if rate is None else group_count(rate)
    if rate is None or groups is None:
        return ""
    return f"{groups if rate.value else 0} of {groups} groups: {bounds(rate)}\u00a0% with 95\u00a0% confidence"


def change(comparison: Comparison | None) -> str:
    """``"-87.5 *"`` in percentage points, the asterisk where the change is significant, or nothing."""
    if comparison is None:
        return ""
    return f"{100 * comparison.difference:+.1f}{' *' if significant(comparison) else ''}"


def significant(comparison: Comparison) -> bool:
    """Whether chance would hardly do it, with all comparisons of the summary allowed for."""
    return comparison.p_adjusted < SIGNIFICANT


def published(row: Row, metric: str) -> Rate | None:
    """The metric by the published counting, where that was asked for and gives another value."""
    rate, corrected = row.paper.get(metric), row.metrics.get(metric)
    return None if rate is None or (corrected is not None and corrected.value == rate.value) else rate


def notes(summary: Summary, metrics: Sequence[str]) -> list[str]:
    """What a reader must know to read the table: edges, marks, the published counting and what batching changed.

    Args:
        metrics: those that the table shows.
    """
    found = judged_by(judges_of(summary.rows, metrics))
    first = next(
        (text for row in summary.rows for metric in metrics if (text := rule_of_three_note(row.metrics.get(metric)))),
        "",
    )
    if first:
        found.append(f"At 0 and 100\u00a0% the rule of three over groups of answers stands for the interval: {first}.")
    if summary.comparisons:
        base, count = summary.comparisons[0].base, len(summary.comparisons)
        found.append(
            f"Signed numbers: the change against {base} in percentage points, prompt by prompt; "
            f"* significant after Holm's correction over {count} comparison{'s' if count > 1 else ''} (adjusted p < {SIGNIFICANT})."
        )
    if any(published(row, metric) for row in summary.rows for metric in metrics):
        found.append('"Published": the same by the published counting, where that gives another value.')
    found += [
        f"{row.model}: {row.batching.flipped} of {row.batching.checked} answers that were also asked in batches of one came out different."
        for row in summary.rows
        if row.batching is not None
    ]
    return found


def judges_of(rows: Iterable[Row], metrics: Collection[str] | None = None) -> list[str]:
    """The judges whose verdicts rows rest on: of these metrics, or of all that the rows hold, by the published counting too."""
    found: set[str] = set()
    for row in rows:
        if metrics is None:
            found |= {row.judge, *row.judges.values(), *row.paper_judges.values()}
        else:
            found |= {row.judge_of(metric) for metric in metrics if metric in row.metrics}
    return sorted(found - {""})


def judged_by(judges: Sequence[str]) -> list[str]:
    """Whose verdicts a table rests on, and what a keyword judge can't see."""
    found = [f"Judged by {', '.join(judges[:-1])}{' and ' if judges[1:] else ''}{judges[-1]}."] if judges else []
    if any(judge.startswith("keyword") for judge in judges):
        found.append(
            'Keywords see refusals only: "answered" and "right" mean no more by them than not refused and not degenerate.'
        )
    return found


def by_keywords(rows: Sequence[Row]) -> bool:
    """Whether any model's answers were judged by keywords, for any of its metrics."""
    return any(judge.startswith("keyword") for row in rows for judge in (row.judge, *row.judges.values()))


def count_failures(rows: Sequence[Row]) -> int:
    """Answers and verdicts that failed, over all judges, each counted once for each judge."""
    return sum(count for row in rows for of_judge in row.failed.values() for count in of_judge.values())
