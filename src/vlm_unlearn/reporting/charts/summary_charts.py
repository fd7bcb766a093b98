"""Builds the charts of a summary."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vlm_unlearn.evaluation.metric_roles import measured
from vlm_unlearn.records import LABELS, Rate, Row, Summary
from vlm_unlearn.reporting.charts.chart import (
    ATTACKED,
    CONTROL,
    LABEL_STYLES,
    ORIGINAL,
    Bars,
    Chart,
    Heatmap,
    Lines,
    Point,
    Scatter,
    Series,
    Style,
    rates_series,
    style_of,
)
from vlm_unlearn.reporting.columns import BENCHMARKS, METRIC_COLUMNS, columns, heading, split_title
from vlm_unlearn.reporting.metric_roles import MetricRoles

# Metrics that belong together: with the original wording, under the attack, and under control paraphrases.
ATTACKS = (
    ("asr", "asr_attacked", "asr_control", "Unsafe questions answered with the harm", "attack success rate"),
    ("refusal_rate", "refusal_rate_attacked", "refusal_rate_control", "Harmless questions refused", "refusal rate"),
    ("utility", "utility_attacked", "", "Harmless questions answered correctly", "share answered correctly"),
)
RATE_GROUPS = (
    (("efficacy_asr", "generality_asr"), "Unsafe questions answered with the harm", "attack success rate"),
    (("efficacy_rr", "generality_rr"), "Unsafe questions refused", "refusal rate"),
    (("sarr",), "Unsafe questions on a benign image not answered normally", "SARR"),
    (("rouge_l", "answer_score"), "Harmless answers scored", "score"),
)
MAX_BAR_MODELS = 8  # with more models, grouped bars become a heatmap
MAX_CATEGORIES = 40  # in a chart; the table has all categories


def tradeoff_charts(rows: Sequence[Row], roles: MetricRoles) -> dict[str, Chart]:
    """Returns the charts of harm against over-refusal and of harm against utility, if these were measured."""
    charts: dict[str, Chart] = {}
    if roles.harm is None:
        return charts
    for name, metric, best, title in (
        ("tradeoff-refusals", roles.over_refusal, 0.0, "Harm and over-refusal"),
        ("tradeoff-use", roles.utility, 100.0, "Harm and utility"),
    ):
        if metric is None:
            continue
        points = [
            Point(row.model, _percentages(row.metrics[roles.harm]), _percentages(row.metrics[metric]), style_of(number))
            for number, row in enumerate(rows)
            if measured(row, roles.harm) and measured(row, metric)
        ]
        if points:
            charts[name] = Scatter(title, points, _axis_title(roles.harm), _axis_title(metric), (0.0, best))
    return charts


def _axis_title(metric: str) -> str:
    titles = {
        "asr_attacked": "attacked ASR",
        "refusal_rate_attacked": "harmless questions refused, attacked",
        "refusal_rate": "harmless questions refused",
        "utility_attacked": "harmless answered correctly, attacked",
        "utility": "harmless questions answered correctly",
        "sarr": "SARR (over-forgetting)",
    }
    return titles.get(metric, heading(metric))


def _percentages(rate: Rate) -> tuple[float, float, float]:
    """Returns value, low and high in percent."""
    value = 100 * (rate.value or 0.0)
    return value, value if rate.low is None else 100 * rate.low, value if rate.high is None else 100 * rate.high


def attack_charts(rows: Sequence[Row]) -> dict[str, Chart]:
    """Returns the rates before and after the attack and under its control, or nothing for a suite without attacks."""
    charts: dict[str, Chart] = {}
    for original, attacked, control, title, axis in ATTACKS:
        if not any(measured(row, attacked) for row in rows):
            continue
        names = ("original wording", "attacked", "control paraphrase")
        conditions = zip((original, attacked, control), names, (ORIGINAL, ATTACKED, CONTROL), strict=True)
        charts[f"attack-{original}"] = _rate_bars(rows, list(conditions), title, axis)
    return charts


def rate_charts(rows: Sequence[Row]) -> dict[str, Chart]:
    """Returns the charts of the metrics that have no attacked counterpart."""
    charts: dict[str, Chart] = {}
    for metrics, title, axis in RATE_GROUPS:
        if any(measured(row, metric) for row in rows for metric in metrics):
            styled = [
                (metric, heading(metric), style) for metric, style in zip(metrics, (ORIGINAL, ATTACKED), strict=False)
            ]
            charts[f"rates-{metrics[0]}"] = _rate_bars(rows, styled, title, axis)
    benchmarks = [name for name in (*BENCHMARKS, "specificity") if any(measured(row, name) for row in rows)]
    if benchmarks:
        charts["benchmarks"] = _rates_by_key(
            rows, "Utility benchmarks", benchmarks, heading, lambda row, name: row.metrics.get(name)
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
    rows: Sequence[Row],
    title: str,
    keys: Sequence[str],
    key_title: Callable[[str], str],
    get_rate: Callable[[Row, str], Rate | None],
) -> Chart:
    """Returns grouped bars of a few models for each key, such as a category, or a heatmap of many models."""
    titles = [key_title(key) for key in keys]
    series = [
        rates_series(row.model, [get_rate(row, key) for key in keys], style_of(number))
        for number, row in enumerate(rows)
    ]
    if len(rows) > MAX_BAR_MODELS:
        return Heatmap(title, [row.model for row in rows], titles, [of_model.values for of_model in series])
    return Bars(title, titles, series, axis="rate, with its 95 % interval")


def category_charts(rows: Sequence[Row], roles: MetricRoles) -> dict[str, Chart]:
    """Returns the rates by category of the question.

    Covers the metrics of the trade-off plots, ASR, SARR and the metrics that only the suite defines. The table has all
    metrics.
    """
    shipped = {metric for metric, _, _ in METRIC_COLUMNS}
    suite_metrics = [metric for metric, _, _ in columns(rows) if metric not in shipped]
    charts: dict[str, Chart] = {}
    for metric in dict.fromkeys((roles.harm, "asr", "sarr", roles.over_refusal, roles.utility, *suite_metrics)):
        if metric is None:
            continue
        categories = sorted({category for row in rows for category in row.categories.get(metric, {})})
        if len(categories) < 2:
            continue

        def get_rate(row: Row, category: str, metric: str = metric) -> Rate | None:
            return row.categories.get(metric, {}).get(category)

        counts = {category: sum(rate.n for row in rows if (rate := get_rate(row, category))) for category in categories}
        largest = sorted(categories, key=lambda category: (-counts[category], category))[:MAX_CATEGORIES]
        title = f"{heading(metric)} by category"
        if len(largest) < len(categories):
            title += f", the largest {MAX_CATEGORIES} ({len(categories) - MAX_CATEGORIES:,} more in the table)"
        charts[f"categories-{len(charts) + 1}"] = _rates_by_key(rows, title, sorted(largest), str, get_rate)
    return charts


def rewrite_charts(rows: Sequence[Row]) -> dict[str, Chart]:
    """Returns for each metric the rate with the first 1, 2, ... K rewrites of each question, one line per model."""
    charts: dict[str, Chart] = {}
    for number, metric in enumerate(dict.fromkeys(metric for row in rows for metric in row.rewrites), start=1):
        series = []
        for index, row in enumerate(rows):
            points = [
                (count, rate)
                for count, rate in enumerate(row.rewrites.get(metric, []), start=1)
                if rate.value is not None
            ]
            if points:
                rates = [rate for _, rate in points]
                series.append(rates_series(row.model, rates, style_of(index), [count for count, _ in points]))
        if series:
            title = f"{heading(metric)} by the number of rewrites"
            charts[f"shots-{number}"] = Lines(title, series, "rewrites of each question", heading(metric), percent=True)
    return charts


def label_charts(rows: Sequence[Row]) -> dict[str, Chart]:
    """Returns the distribution of the labels of each split, including failures, in percent of all answers."""
    charts: dict[str, Chart] = {}
    for number, split in enumerate(dict.fromkeys(split for row in rows for split in row.labels), start=1):
        answered = [row for row in rows if sum(row.labels.get(split, {}).values())]
        series = []
        for label in (*LABELS, "failed"):
            counts = [row.labels[split].get(label, 0) for row in answered]
            shares = [
                100 * count / sum(row.labels[split].values()) for row, count in zip(answered, counts, strict=True)
            ]
            if any(counts):
                series.append(Series(label.replace("_", " "), shares, (), (), LABEL_STYLES[label]))
        if series:
            title = split_title(split)
            charts[f"labels-{number}"] = Bars(
                title[0].upper() + title[1:],
                [row.model for row in answered],
                series,
                stacked=True,
                axis="share of the answers",
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
