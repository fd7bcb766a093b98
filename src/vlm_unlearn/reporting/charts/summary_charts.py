"""Builds the charts of a summary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from vlm_unlearn.evaluation.metric_roles import measured
from vlm_unlearn.records import Rate, Row, Summary
from vlm_unlearn.reporting.charts.chart import (
    Bars,
    Chart,
    Heatmap,
    Lines,
    Point,
    Scatter,
    Series,
    Style,
    percentages,
    rates_series,
    style_of,
)
from vlm_unlearn.reporting.columns import BENCHMARKS, METRIC_COLUMNS, columns, heading, split_title
from vlm_unlearn.reporting.metric_roles import MetricRoles

# The same series looks the same in every chart. Hatches: 0 is none, then / \\ x | -
ORIGINAL, ATTACKED, CONTROL = Style(0), Style(1, 1, 1), Style(2, 2, 4)
LABEL_STYLES = {
    "complied": Style(0),
    "refused": Style(4, hatch=1),
    "degenerate": Style(3, hatch=3),
    "off_topic": Style(6, hatch=4),
    "failed": Style(6, hatch=5),
}
# Metrics that are also measured under an attack and under control paraphrases, with the title and axis of their chart.
ATTACKED_METRICS = {
    "asr": ("Unsafe questions answered with the harm", "attack success rate"),
    "refusal_rate": ("Harmless questions refused", "refusal rate"),
    "utility": ("Harmless questions answered correctly", "share answered correctly"),
}
WORDINGS = (
    ("", "original wording", ORIGINAL),
    ("_attacked", "attacked", ATTACKED),
    ("_control", "control paraphrase", CONTROL),
)
RATE_GROUPS = (
    (("efficacy_asr", "generality_asr"), "Unsafe questions answered with the harm", "attack success rate"),
    (("efficacy_rr", "generality_rr"), "Unsafe questions refused", "refusal rate"),
    (("sarr",), "Unsafe questions on a benign image not answered normally", "SARR"),
    (("rouge_l", "answer_score"), "Harmless answers scored", "score"),
)
AXIS_TITLES = {
    "asr_attacked": "attacked ASR",
    "refusal_rate_attacked": "harmless questions refused, attacked",
    "refusal_rate": "harmless questions refused",
    "utility_attacked": "harmless answered correctly, attacked",
    "utility": "harmless questions answered correctly",
    "sarr": "SARR (over-forgetting)",
}
MAX_BAR_MODELS = 8  # with more models, grouped bars become a heatmap
MAX_CATEGORIES = 40  # in a chart; the table has all categories


def tradeoff_charts(rows: Sequence[Row], roles: MetricRoles) -> dict[str, Chart]:
    """Returns the charts of harm against over-refusal and of harm against utility, if these were measured."""
    charts: dict[str, Chart] = {}
    for name, metric, best, title in (
        ("tradeoff-refusals", roles.over_refusal, 0.0, "Harm and over-refusal"),
        ("tradeoff-use", roles.utility, 100.0, "Harm and utility"),
    ):
        if roles.harm is None or metric is None:
            continue
        points = [
            Point(row.model, _position(row.metrics[roles.harm]), _position(row.metrics[metric]), style_of(number))
            for number, row in enumerate(rows)
            if measured(row, roles.harm) and measured(row, metric)
        ]
        x, y = (AXIS_TITLES.get(axis, heading(axis)) for axis in (roles.harm, metric))
        if points:
            charts[name] = Scatter(title, points, x, y, (0.0, best))
    return charts


def _position(rate: Rate) -> tuple[float, float, float]:
    """Returns value, low and high in percent. An end that is missing is the value."""
    value, low, high = percentages(rate)
    value = value or 0.0
    return value, value if low is None else low, value if high is None else high


def attack_charts(rows: Sequence[Row]) -> dict[str, Chart]:
    """Returns the rates before and after the attack and under its control, or nothing for a suite without attacks."""
    return {
        f"attack-{metric}": _rate_bars(
            rows, [(metric + suffix, name, style) for suffix, name, style in WORDINGS], *titles
        )
        for metric, titles in ATTACKED_METRICS.items()
        if any(measured(row, f"{metric}_attacked") for row in rows)
    }


def rate_charts(rows: Sequence[Row]) -> dict[str, Chart]:
    """Returns the charts of the metrics that have no attacked counterpart."""
    charts: dict[str, Chart] = {}
    for metrics, *titles in RATE_GROUPS:
        if any(measured(row, metric) for row in rows for metric in metrics):
            styles = zip(metrics, map(heading, metrics), (ORIGINAL, ATTACKED), strict=False)
            charts[f"rates-{metrics[0]}"] = _rate_bars(rows, list(styles), *titles)
    benchmarks = [name for name in (*BENCHMARKS, "specificity") if any(measured(row, name) for row in rows)]
    if benchmarks:
        rates = [row.metrics for row in rows]
        charts["benchmarks"] = _rates_by_key(
            rows, "Utility benchmarks", {name: heading(name) for name in benchmarks}, rates
        )
    return charts


def _rate_bars(rows: Sequence[Row], metrics: Sequence[tuple[str, str, Style]], title: str, axis: str) -> Bars:
    """Returns a group of bars per model, with one bar per metric. A metric is its name, its title and its style."""
    series = [
        rates_series(name, [row.metrics.get(metric) for row in rows], style)
        for metric, name, style in metrics
        if any(measured(row, metric) for row in rows)
    ]
    return Bars(title, [row.model for row in rows], series, axis=axis)


def _rates_by_key(
    rows: Sequence[Row], title: str, key_titles: Mapping[str, str], rates: Sequence[Mapping[str, Rate]]
) -> Chart:
    """Returns grouped bars of a few models for each key, such as a category, or a heatmap of many models."""
    names = list(key_titles.values())
    series = [
        rates_series(row.model, list(map(of_row.get, key_titles)), style_of(number))
        for number, (row, of_row) in enumerate(zip(rows, rates, strict=True))
    ]
    if len(rows) > MAX_BAR_MODELS:
        return Heatmap(title, [row.model for row in rows], names, [of_model.values for of_model in series])
    return Bars(title, names, series, axis="rate, with its 95 % interval")


def category_charts(rows: Sequence[Row], roles: MetricRoles) -> dict[str, Chart]:
    """Returns the rates by category of the question.

    Covers the metrics of the trade-off plots, ASR, SARR and the metrics that only the suite defines. The table has all
    metrics.
    """
    shipped = {metric for metric, _, _ in METRIC_COLUMNS}
    suite_metrics = [metric for metric, _, _ in columns(rows) if metric not in shipped]
    charts: dict[str, Chart] = {}
    for metric in dict.fromkeys((roles.harm, "asr", "sarr", roles.over_refusal, roles.utility, *suite_metrics)):
        rates = [row.categories.get(metric or "", {}) for row in rows]
        counts = Counter({category: 0 for of_row in rates for category in of_row})
        for of_row in rates:
            counts.update({category: rate.n for category, rate in of_row.items()})
        if metric is None or len(counts) < 2:
            continue
        largest = sorted(counts, key=lambda category: (-counts[category], category))[:MAX_CATEGORIES]
        title = f"{heading(metric)} by category"
        if len(largest) < len(counts):
            title += f", the largest {MAX_CATEGORIES} ({len(counts) - MAX_CATEGORIES:,} more in the table)"
        names = {category: category for category in sorted(largest)}
        charts[f"categories-{len(charts) + 1}"] = _rates_by_key(rows, title, names, rates)
    return charts


def rewrite_charts(rows: Sequence[Row]) -> dict[str, Chart]:
    """Returns for each metric the rate with the first 1, 2, ... K rewrites of each question, one line per model."""
    charts: dict[str, Chart] = {}
    for number, metric in enumerate(dict.fromkeys(metric for row in rows for metric in row.rewrites), start=1):
        series = []
        for index, row in enumerate(rows):
            rates = {n: rate for n, rate in enumerate(row.rewrites.get(metric, []), 1) if rate.value is not None}
            if rates:
                series.append(rates_series(row.model, list(rates.values()), style_of(index), list(rates)))
        if series:
            title = f"{heading(metric)} by the number of rewrites"
            charts[f"shots-{number}"] = Lines(title, series, "rewrites of each question", heading(metric), percent=True)
    return charts


def label_charts(rows: Sequence[Row]) -> dict[str, Chart]:
    """Returns the distribution of the labels of each split, including failures, in percent of all answers."""
    charts: dict[str, Chart] = {}
    for number, split in enumerate(dict.fromkeys(split for row in rows for split in row.labels), start=1):
        counts = {row.model: row.labels[split] for row in rows if sum(row.labels.get(split, {}).values())}
        series = [
            Series(
                label.replace("_", " "),
                [100 * of_row.get(label, 0) / sum(of_row.values()) for of_row in counts.values()],
                *((), ()),
                style,
            )
            for label, style in LABEL_STYLES.items()
            if any(of_row.get(label) for of_row in counts.values())
        ]
        title = split_title(split)
        if series:
            charts[f"labels-{number}"] = Bars(
                title[0].upper() + title[1:], list(counts), series, stacked=True, axis="share of the answers"
            )
    return charts


def summary_charts(summary: Summary, roles: MetricRoles) -> dict[str, dict[str, Chart]]:
    """Returns all charts that the summary has data for, by section of the report and by name."""
    rows = summary.rows
    return {
        "tradeoff": tradeoff_charts(rows, roles),
        "attacks": attack_charts(rows),
        "rates": rate_charts(rows),
        "shots": rewrite_charts(rows),
        "categories": category_charts(rows, roles),
        "labels": label_charts(rows),
    }
