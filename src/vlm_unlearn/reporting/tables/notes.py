"""Sentences of captions: how many answers or questions the numbers of a table rest on, and how many failed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vlm_unlearn.records import Rate, Row

RatesByTitle = Mapping[str, Sequence[Rate]]  # title of a metric -> its rates


def metric_notes(rows: Sequence[Row], titles: Mapping[str, str]) -> list[str]:
    """Returns the notes on the metrics of a table.

    Args:
        rows: The rows of the table.
        titles: The title of each metric.
    """
    rates = rates_by_title(rows, titles)
    return rate_notes(rates, rates)


def rates_by_title(rows: Sequence[Row], titles: Mapping[str, str]) -> RatesByTitle:
    """Returns the rates of all rows by the title of the metric. The arguments are those of `metric_notes`."""
    return {title: [row.metrics[metric] for row in rows if metric in row.metrics] for metric, title in titles.items()}


def rate_notes(rates: RatesByTitle, all_rates: RatesByTitle) -> list[str]:
    """Returns the notes on the rates of a table: sample sizes and failures.

    Args:
        rates: The rates of the table.
        all_rates: Rates that together include each failure exactly once.
    """
    sizes = {title: [rate.n for rate in of_metric] for title, of_metric in rates.items() if of_metric}
    return [f"{describe_counts('n = ', sizes)}.", failure_note(all_rates)] if sizes else []


def failure_note(rates: RatesByTitle) -> str:
    """Returns the note on failed answers and verdicts."""
    failed = {title: [sum(rate.failed for rate in of_metric)] for title, of_metric in rates.items()}
    failed = {title: counts for title, counts in failed.items() if counts != [0]}
    return f"{describe_counts('Failed answers or verdicts, over all models: ', failed)}." if failed else "None failed."


def describe_counts(prefix: str, counts_by_title: Mapping[str, Sequence[int]]) -> str:
    """Returns ``"n = 36 (ASR), 36 to 40 (SARR, Refusals)"``. Metrics with equal counts are listed together.

    Args:
        prefix: The beginning of the text, such as ``"n = "``.
        counts_by_title: The counts of all models by the title of the metric.
    """
    titles: dict[str, list[str]] = {}
    for title, counts in counts_by_title.items():
        low, high = min(counts), max(counts)
        titles.setdefault(f"{low:,}" if low == high else f"{low:,} to {high:,}", []).append(title)
    return f"{prefix}{', '.join(count + ' (' + ', '.join(names) + ')' for count, names in titles.items())}"
