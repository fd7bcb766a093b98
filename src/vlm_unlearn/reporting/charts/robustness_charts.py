"""Builds the charts of robustness runs: what each attack brings back from each model, and curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vlm_unlearn.reporting.charts.chart import Chart, Heatmap, Lines, Series, Style, rates_series, style_of
from vlm_unlearn.reporting.formatting import interval, percent
from vlm_unlearn.reporting.robustness.formatting import recovered_interval, recovered_percent
from vlm_unlearn.reporting.robustness.ranking import AttackedModel, rank_attacks, supplies_answers
from vlm_unlearn.robustness.results import AttackResult

MAX_ATTACKS = 60  # in the heatmap; the table has all attacks
MAX_MODELS = 30
MAX_INTERVALS = 14  # with more models, the cells have no space for intervals
MAX_LINES = 8  # models in a chart of a curve
STEPS: Mapping[str, str] = {  # the meaning of the steps of a curve, by attack
    "relearn": "steps of training",
    "soft_prompt": "steps of training",
    "restore": "share of the base's weights",
    "prune": "share of the weights at zero",
    "probe": "layer",
}
BASE, NEVER_KNEW = Style(6, 1), Style(6, 2)


def robustness_charts(models: Sequence[AttackedModel]) -> dict[str, dict[str, Chart]]:
    """Returns the charts by section of the report and by name.

    Args:
        models: The models, the worst case first, as `rank_models` returns them.
    """
    return {"attack_map": attack_map(models), "curves": curve_charts(models)}


def attack_map(models: Sequence[AttackedModel]) -> dict[str, Chart]:
    """Returns a heatmap with a row per attack and a column per model, strongest attack and worst model first.

    A cell shows the recovered share in percent with its interval. Where it is undefined, the cell is hatched and shows
    the rate in parentheses.
    """
    attacks = rank_attacks(models)
    if not attacks:
        return {}
    attacks_in_chart, models_in_chart = attacks[:MAX_ATTACKS], models[:MAX_MODELS]
    results = [{result.name: result for result in model.report.attacks} for model in models_in_chart]
    with_intervals = len(models_in_chart) <= MAX_INTERVALS
    values, texts, hovers = [], [], []
    for attack in attacks_in_chart:
        cells = [of_model.get(attack) for of_model in results]
        values.append([_percentage(result) for result in cells])
        texts.append([_cell_text(result, with_intervals) for result in cells])
        hovers.append(
            [
                f"{attack}, {model.name}: {_describe(result)}"
                for model, result in zip(models_in_chart, cells, strict=True)
            ]
        )
    title = "Recovered by each attack, in %"
    omitted = [
        f"{count} more {noun}"
        for count, noun in (
            (len(attacks) - len(attacks_in_chart), "attacks"),
            (len(models) - len(models_in_chart), "models"),
        )
        if count
    ]
    if omitted:
        title += f" ({' and '.join(omitted)} in the table)"
    names = [model.name for model in models_in_chart]
    description = (
        f"Heat map with {len(attacks_in_chart)} attacks as rows and {len(models_in_chart)} models as columns, "
        "strongest attack and worst model first. The table of all attacks below has its numbers."
    )
    return {"attack-map": Heatmap(title, attacks_in_chart, names, values, texts, hovers, description=description)}


def _percentage(result: AttackResult | None) -> float | None:
    return None if result is None or result.recovered.value is None else 100 * result.recovered.value


def _cell_text(result: AttackResult | None, with_interval: bool) -> str:
    if result is None:
        return ""
    if result.recovered.value is None:
        return "(–)" if result.asr.value is None else f"({100 * result.asr.value:.0f})"
    text = f"{100 * result.recovered.value:.0f}"
    return f"{text}\n{recovered_interval(result.recovered)}" if with_interval else text


def _describe(result: AttackResult | None) -> str:
    if result is None:
        return "not tried"
    rate = "score" if result.is_score else "ASR"
    rates = [(rate, result.asr), ("base", result.asr_base), ("never knew", result.asr_never_knew)]
    described = [f"{name} {percent(each)} {interval(each)}".rstrip() for name, each in rates if each is not None]
    recovery = result.recovered
    share = "undefined" if recovery.value is None else f"{recovered_percent(recovery)} {recovered_interval(recovery)}"
    failed = f", {result.asr.failed:,} failed" if result.asr.failed else ""
    return f"recovered {share}, {', '.join(described)}{failed}"


def curve_charts(models: Sequence[AttackedModel]) -> dict[str, Chart]:
    """Returns a chart for each curve of at least two steps, such as those of relearning.

    It has a line per model, one of the base and one of the control. Curves of attacks that supply the answers are last.
    """
    results = [result for model in models for result in model.report.attacks if result.curve]
    curves = {result.curve: (supplies_answers(result), result.is_score, result.attack) for result in results}
    charts: dict[str, Chart] = {}
    for curve, (_, is_score, attack) in sorted(curves.items(), key=lambda pair: pair[1][:2]):
        points = {model.name: _points(model, curve) for model in models}
        measured = {name: of_model for name, of_model in points.items() if of_model}
        if len({point.step for of_model in measured.values() for point in of_model}) < 2:
            continue  # a single step is no curve
        series = [
            _line(name, measured[name], "asr", style_of(list(points).index(name)))
            for name in list(measured)[:MAX_LINES]
        ]
        omitted = len(measured) - len(series)
        title = f"{curve} ({omitted} more models in the table)" if omitted else curve
        series += _references("base", "asr_base", measured, BASE)
        series += _references("never knew", "asr_never_knew", measured, NEVER_KNEW)
        description = f"Curves of {len(series)} models. The table of all attacks has the numbers."
        axes = STEPS.get(attack, "step"), "mean score" if is_score else "attack success rate"
        charts[f"curve-{len(charts) + 1}"] = Lines(title, series, *axes, percent=True, description=description)
    return charts


def _points(model: AttackedModel, curve: str) -> list[AttackResult]:
    points = [
        result
        for result in model.report.attacks
        if result.curve == curve and result.step is not None and result.asr.value is not None
    ]
    return sorted(points, key=lambda point: point.step or 0.0)


def _line(name: str, points: Sequence[AttackResult], rate: str, style: Style, is_reference: bool = False) -> Series:
    measured = [
        point for point in points if getattr(point, rate) is not None and getattr(point, rate).value is not None
    ]
    line = rates_series(
        name, [getattr(point, rate) for point in measured], style, [point.step or 0.0 for point in measured]
    )
    return Series(line.name, line.values, line.low, line.high, style, line.x, is_reference)


def _references(name: str, rate: str, measured: Mapping[str, Sequence[AttackResult]], style: Style) -> list[Series]:
    """Returns the line of the base or of the control. If models have different ones, each line names its model."""
    lines: dict[tuple[object, ...], Series] = {}
    for model, points in measured.items():
        line = _line(name, points, rate, style, is_reference=True)
        key = (*line.values, *line.x)
        if line.values and key not in lines:
            lines[key] = line if not lines else _line(f"{name}, of {model}", points, rate, style, is_reference=True)
    return list(lines.values())[:MAX_LINES]
