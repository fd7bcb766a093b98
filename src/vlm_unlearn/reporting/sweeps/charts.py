"""Builds the charts of a sweep: fronts, parallel coordinates, importance of settings, hypervolume."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from vlm_unlearn.config import Sweep
from vlm_unlearn.reporting.charts.chart import (
    Bars,
    Chart,
    Front,
    FrontPoint,
    Lines,
    Parallel,
    ParallelAxis,
    Series,
    Value,
    style_of,
)
from vlm_unlearn.sweeps.records import SeedResult, SweepResult, Trial

MAX_FRONTS = 6  # pairs of objectives with a chart


def sweep_charts(sweep: Sweep, result: SweepResult) -> dict[str, Chart]:
    """Returns the charts that a sweep has data for, by name."""
    complete = [trial for trial in result.trials if trial.state == "complete"]
    if not complete:
        return {}
    charts: dict[str, Chart] = {}
    pairs = list(itertools.combinations(sweep.objectives, 2))[:MAX_FRONTS]
    for number, (x, y) in enumerate(pairs, start=1):
        charts[f"pareto-{number}"] = _front(result, complete, x, y)
    charts["parallel"] = _parallel(sweep, result, complete)
    if result.importance:
        charts["importance"] = _importance(result)
    steps = list(range(1, len(result.hypervolume) + 1))
    if len(steps) > 1:
        volume = Series("hypervolume", result.hypervolume, (), (), style_of(0), steps)
        charts["hypervolume"] = Lines("Hypervolume after each trial", [volume], "trials", "hypervolume", False, False)
    return charts


def trial_name(trial: Trial) -> str:
    """Returns the number of a trial and its settings on one line."""
    return f"trial {trial.number}: {', '.join(f'{key}={short(value)}' for key, value in trial.params.items())}"


def short(value: object) -> str:
    """Returns a setting as text. Fractions have three digits."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def seed_value(result: SeedResult, metric: str) -> float | None:
    """Returns a metric of one trained model on the reported questions."""
    if metric in result.recovery:
        return result.recovery[metric]
    rate = result.reported.get(metric)
    return None if rate is None else rate.value


def _front(result: SweepResult, complete: Sequence[Trial], x: str, y: str) -> Front:
    points: list[FrontPoint] = []
    if x in result.base and y in result.base:
        points.append(FrontPoint("base", 100 * result.base[x], 100 * result.base[y], "base"))
    front = set(result.front)
    for trial in complete:
        if x not in trial.reported or y not in trial.reported:
            continue
        kind = "front" if trial.number in front else "dominated" if trial.feasible else "outside"
        seeds = [
            (100 * first, 100 * second)
            for seed in trial.seeds
            if (first := seed_value(seed, x)) is not None and (second := seed_value(seed, y)) is not None
        ]
        position = 100 * trial.reported[x], 100 * trial.reported[y]
        points.append(FrontPoint(trial_name(trial), *position, kind, seeds if len(trial.seeds) > 1 else ()))
    directions = {name: f"{name}, % ({direction})" for name, direction in result.objectives.items()}
    description = (
        f"{len(points)} points. The front has {len(front)} trials: "
        + "; ".join(
            f"{trial_name(trial)} at {100 * trial.reported[x]:.1f} and {100 * trial.reported[y]:.1f}"
            for trial in map(result.trial, result.front)
            if x in trial.reported and y in trial.reported
        )
        + "."
    )
    return Front(f"{x} and {y}", points, directions[x], directions[y], description=description)


def _parallel(sweep: Sweep, result: SweepResult, complete: Sequence[Trial]) -> Parallel:
    axes = []
    for key, parameter in sweep.space.items():
        values = [trial.params.get(key) for trial in complete]
        if parameter.choices is not None:
            axes.append(_choice_axis(key, values, parameter.choices))
        else:
            axes.append(_number_axis(key, values, parameter.log))
    for name in sweep.objectives:
        axes.append(_number_axis(f"{name}, %", [_percent(trial.reported.get(name)) for trial in complete], False))
    front = set(result.front)
    return Parallel(
        "Settings and objectives of the trials",
        [trial_name(trial) for trial in complete],
        axes,
        [trial.number in front for trial in complete],
    )


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _choice_axis(name: str, values: Sequence[Any], choices: Sequence[Any]) -> ParallelAxis:
    texts = [str(choice) for choice in choices]
    places = {text: number / max(1, len(texts) - 1) for number, text in enumerate(texts)}
    positions = [None if value is None else places.get(str(value)) for value in values]
    return ParallelAxis(name, positions, [(place, text) for text, place in places.items()])


def _number_axis(name: str, values: Sequence[Value], log: bool) -> ParallelAxis:
    measured = [value for value in values if value is not None]
    if not measured:
        return ParallelAxis(name, [None] * len(values), [])
    low, high = min(measured), max(measured)

    def position(value: float) -> float:
        if high == low:
            return 0.5
        if log:
            return math.log(value / low) / math.log(high / low)
        return (value - low) / (high - low)

    ticks = [(position(low), f"{low:.3g}"), (position(high), f"{high:.3g}")] if high > low else [(0.5, f"{low:.3g}")]
    return ParallelAxis(name, [None if value is None else position(value) for value in values], ticks)


def _importance(result: SweepResult) -> Bars:
    keys = list(dict.fromkeys(key for values in result.importance.values() for key in values))
    series = [
        Series(name, [100 * values.get(key, 0.0) for key in keys], (), (), style_of(number))
        for number, (name, values) in enumerate(result.importance.items())
    ]
    return Bars("Importance of the settings for each objective (PED-ANOVA)", keys, series, axis="share of the variance")
