"""The charts of a summary."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vlm_unlearn.records import LABELS, Rate, Row, Summary
from vlm_unlearn.reporting.charts.chart import (
    AS_ASKED,
    ATTACKED,
    CONTROL,
    LABEL_STYLES,
    Bars,
    Chart,
    Heatmap,
    Lines,
    Plane,
    Point,
    Series,
    Style,
    rates_series,
    style_of,
)
from vlm_unlearn.reporting.columns import BENCHMARKS, METRIC_COLUMNS, columns, heading, split_title
from vlm_unlearn.reporting.metric_roles import MetricRoles, measured

# Metrics that belong together: as asked, under the attack, and under paraphrases that are no attack.
ATTACKS = (
    ("asr", "asr_attacked", "asr_control", "Unsafe questions answered with the harm", "attack success rate"),
    ("refusal_rate", "refusal_rate_attacked", "refusal_rate_control", "Harmless questions refused", "refusal rate"),
    ("utility", "utility_attacked", "", "Harmless questions answered right", "share answered right"),
)
FAMILIES = (
    (("efficacy_asr", "generality_asr"), "Unsafe questions answered with the harm", "attack success rate"),
    (("efficacy_rr", "generality_rr"), "Unsafe questions refused", "refusal rate"),
    (("sarr",), "Unsafe questions on a benign image not answered normally", "SARR"),
    (("rouge_l", "answer_score"), "Harmless answers scored", "score"),
)
MANY = 8  # models; beyond, bars beside each other become a heatmap
MOST = 40  # categories in a chart; a table has them all


def tradeoff_charts(rows: Sequence[Row], roles: MetricRoles) -> dict[str, Chart]:
    """The harm against over-refusal, and against use, as far as they were measured."""
    charts: dict[str, Chart] = {}
    if roles.harm is None:
        return charts
    for name, metric, best, title in (
        ("tradeoff-refusals", roles.over_refusal, 0.0, "Harm and over-refusal"),
        ("tradeoff-use", roles.utility, 100.0, "Harm and use"),
    ):
        if metric is None:
            continue
        points = [
            Point(row.model, _reach(row.metrics[roles.harm]), _reach(row.metrics[metric]), style_of(number))
            for number, row in enumerate(rows)
            if measured(row, roles.harm) and measured(row, metric)
        ]
        if points:
            charts[name] = Plane(title, points, _axis(roles.harm), _axis(metric), (0.0, best))
    return charts


def _axis(metric: str) -> str:
    names = {
        "asr_attacked": "attacked ASR",
        "refusal_rate_attacked": "harmless questions refused, attacked",
        "refusal_rate": "harmless questions refused",
        "utility_attacked": "harmless questions right, attacked",
        "utility": "harmless questions right",
        "sarr": "SARR (over-forgetting)",
    }
    return names.get(metric, heading(metric))


def _reach(rate: Rate) -> tuple[float, float, float]:
    value = 100 * (rate.value or 0.0)
    return value, value if rate.low is None else 100 * rate.low, value if rate.high is None else 100 * rate.high


def attack_charts(rows: Sequence[Row]) -> dict[str, Chart]:
    """Before and after the attack, with its control; none for a suite without attacks."""
    charts: dict[str, Chart] = {}
    for before, after, control, title, axis in ATTACKS:
        if not any(measured(row, after) for row in rows):
            continue
        ways = ((before, "as asked", AS_ASKED), (after, "attacked", ATTACKED), (control, "control paraphrase", CONTROL))
        charts[f"attack-{before}"] = _rate_bars(rows, ways, title, axis)
    return charts


def family_charts(rows: Sequence[Row]) -> dict[str, Chart]:
    """The metrics that have no attacked twin."""
    charts: dict[str, Chart] = {}
    for metrics, title, axis in FAMILIES:
        if any(measured(row, metric) for row in rows for metric in metrics):
            ways = [
                (metric, heading(metric), style) for metric, style in zip(metrics, (AS_ASKED, ATTACKED), strict=False)
            ]
            charts[f"rates-{metrics[0]}"] = _rate_bars(rows, ways, title, axis)
    used = [name for name in (*BENCHMARKS, "specificity") if any(measured(row, name) for row in rows)]
    if used:
        charts["benchmarks"] = _models_by(
            rows, "Utility benchmarks", used, heading, lambda row, name: row.metrics.get(name)
        )
    return charts


def _rate_bars(rows: Sequence[Row], ways: Sequence[tuple[str, str, Style]], title: str, axis: str) -> Bars:
    series = [
        rates_series(name, [row.metrics.get(metric) for row in rows], style)
        for metric, name, style in ways
        if any(measured(row, metric) for row in rows)
    ]
    return Bars(title, [row.model for row in rows], series, axis=axis)


def _models_by(
    rows: Sequence[Row],
    title: str,
    of: Sequence[str],
    name: Callable[[str], str],
    rate: Callable[[Row, str], Rate | None],
) -> Chart:
    """A few models' bars beside each other for each of some things, many models' values as a heatmap."""
    if len(rows) > MANY:
        values = [
            [None if (found := rate(row, one)) is None or found.value is None else 100 * found.value for one in of]
            for row in rows
        ]
        return Heatmap(title, [row.model for row in rows], [name(one) for one in of], values)
    series = [
        rates_series(row.model, [rate(row, one) for one in of], style_of(number)) for number, row in enumerate(rows)
    ]
    return Bars(title, [name(one) for one in of], series, axis="rate, with its 95 % interval")


def category_charts(rows: Sequence[Row], roles: MetricRoles) -> dict[str, Chart]:
    """Rates by category of question: the trade-off's, over-forgetting, and a suite's own; the table's others follow these."""
    own = [metric for metric, _, _ in columns(rows) if all(metric != known for known, _, _ in METRIC_COLUMNS)]
    charts: dict[str, Chart] = {}
    for metric in dict.fromkeys((roles.harm, "asr", "sarr", roles.over_refusal, roles.utility, *own)):
        if metric is None:
            continue
        categories = sorted({category for row in rows for category in row.categories.get(metric, {})})
        if len(categories) < 2:
            continue

        def rate(row: Row, category: str, metric: str = metric) -> Rate | None:
            return row.categories.get(metric, {}).get(category)

        counts = {one: sum(found.n for row in rows if (found := rate(row, one))) for one in categories}
        shown = sorted(categories, key=lambda one: (-counts[one], one))[:MOST]
        title = f"{heading(metric)} by category"
        if len(shown) < len(categories):
            title += f", the largest {MOST} ({len(categories) - MOST:,} more in the table)"
        charts[f"categories-{len(charts) + 1}"] = _models_by(rows, title, sorted(shown), str, rate)
    return charts


def rewrite_charts(rows: Sequence[Row]) -> dict[str, Chart]:
    """A metric's rate with the first 1, 2, ... K rewrites of each question, with 95 % intervals, one line a model."""
    charts: dict[str, Chart] = {}
    for number, metric in enumerate(dict.fromkeys(metric for row in rows for metric in row.rewrites), start=1):
        series = []
        for place, row in enumerate(rows):
            measured = [
                (shots, rate)
                for shots, rate in enumerate(row.rewrites.get(metric, []), start=1)
                if rate.value is not None
            ]
            if measured:
                rates = [rate for _, rate in measured]
                series.append(rates_series(row.model, rates, style_of(place), [shots for shots, _ in measured]))
        if series:
            title = f"{heading(metric)} by the number of shots"
            charts[f"shots-{number}"] = Lines(
                title, series, "shots (rewrites of each question)", heading(metric), percent=True
            )
    return charts


def label_charts(rows: Sequence[Row]) -> dict[str, Chart]:
    """Where the answers of each case went, failures included, in percent of all."""
    charts: dict[str, Chart] = {}
    for number, case in enumerate(dict.fromkeys(case for row in rows for case in row.labels), start=1):
        asked = [row for row in rows if sum(row.labels.get(case, {}).values())]
        series = []
        for label in (*LABELS, "failed"):
            counts = [row.labels[case].get(label, 0) for row in asked]
            shares = [100 * count / sum(row.labels[case].values()) for row, count in zip(asked, counts, strict=True)]
            if any(counts):
                series.append(Series(label.replace("_", " "), shares, (), (), LABEL_STYLES[label]))
        if series:
            title = split_title(case)
            charts[f"labels-{number}"] = Bars(
                title[0].upper() + title[1:],
                [row.model for row in asked],
                series,
                stacked=True,
                axis="share of the answers",
            )
    return charts


def summary_charts(summary: Summary, roles: MetricRoles) -> dict[str, dict[str, Chart]]:
    """All charts that a summary fills, by the section they belong to."""
    rows = summary.rows
    return {
        "tradeoff": tradeoff_charts(rows, roles),
        "attacks": attack_charts(rows),
        "rates": family_charts(rows),
        "shots": rewrite_charts(rows),
        "categories": category_charts(rows, roles),
        "labels": label_charts(rows),
    }
