"""The Pareto front of a sweep: trials that no other dominates, the knee, and the hypervolume."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from vlm_unlearn.config.sweep import Direction
from vlm_unlearn.sweeps.records import Trial

Point = tuple[float, ...]
KNEE = "knee"


def costs(trial: Trial, objectives: Mapping[str, Direction]) -> Point:
    """Returns the objectives of a trial as costs, of which less is better."""
    return tuple(
        trial.values[name] if direction == "min" else -trial.values[name] for name, direction in objectives.items()
    )


def comparable(trials: Sequence[Trial]) -> list[Trial]:
    """Returns the complete trials that meet the constraints, without copies of an earlier configuration."""
    configurations: set[str] = set()
    distinct: list[Trial] = []
    for trial in trials:
        if trial.state == "complete" and trial.feasible and trial.configuration not in configurations:
            distinct.append(trial)
            configurations.add(trial.configuration or f"trial {trial.number}")
    return distinct


def pareto_front(trials: Sequence[Trial], objectives: Mapping[str, Direction]) -> list[Trial]:
    """Returns the trials that no other dominates, the best by the first objective first."""
    candidates = {trial.number: costs(trial, objectives) for trial in comparable(trials)}
    front = [
        trial
        for trial in comparable(trials)
        if not any(dominates(other, candidates[trial.number]) for other in candidates.values())
    ]
    return sorted(front, key=lambda trial: (candidates[trial.number], trial.number))


def dominates(first: Point, second: Point) -> bool:
    """Returns whether a point is nowhere worse than another and somewhere better."""
    return first != second and all(left <= right for left, right in zip(first, second, strict=True))


def knee(front: Sequence[Trial], objectives: Mapping[str, Direction]) -> Trial | None:
    """Returns the trial of a front that is closest to its best values. None for an empty front.

    Each objective is scaled from 0 to 1 over the front, and the distance to the point with the best value of each
    objective is Euclidean.
    """
    if not front:
        return None
    points = [costs(trial, objectives) for trial in front]
    lows, highs = (
        [min(column) for column in zip(*points, strict=True)],
        [max(column) for column in zip(*points, strict=True)],
    )

    def distance(point: Point) -> float:
        return math.fsum(
            ((value - low) / (high - low)) ** 2
            for value, low, high in zip(point, lows, highs, strict=True)
            if high > low
        )

    return min(zip(front, points, strict=True), key=lambda pair: (distance(pair[1]), pair[0].number))[0]


def choose(trials: Sequence[Trial], objectives: Mapping[str, Direction]) -> dict[str, Trial]:
    """Returns the knee of the front, and the best trial by each objective, of those that meet the constraints."""
    front = pareto_front(trials, objectives)
    middle = knee(front, objectives)
    if middle is None:
        return {}
    names = list(objectives)
    choices = {KNEE: middle}
    for index, name in enumerate(names):
        choices[f"best-{name}"] = min(
            front, key=lambda trial: (costs(trial, objectives)[index], costs(trial, objectives), trial.number)
        )
    return choices


def hypervolumes(trials: Sequence[Trial], objectives: Mapping[str, Direction]) -> list[float]:
    """Returns the hypervolume of the front after each trial.

    The reference point is the worst rate of each objective: 1 for ``min`` and 0 for ``max``, or the worst value that
    occurs if that is worse.
    """
    points = {trial.number: costs(trial, objectives) for trial in comparable(trials)}
    reference = tuple(
        max([1.0 if direction == "min" else 0.0, *(point[index] for point in points.values())])
        for index, direction in enumerate(objectives.values())
    )
    volumes: list[float] = []
    reached: list[Point] = []
    for trial in trials:
        if trial.number in points:
            reached.append(points[trial.number])
            volumes.append(hypervolume(reached, reference))
        else:
            volumes.append(volumes[-1] if volumes else 0.0)
    return volumes


def hypervolume(points: Sequence[Point], reference: Point) -> float:
    """Returns the volume that points dominate, up to a reference point. Less is better in each coordinate.

    It is cut into slices along the last coordinate, whose areas are hypervolumes of one dimension less.
    """
    inside = [point for point in points if all(value < end for value, end in zip(point, reference, strict=True))]
    if not inside:
        return 0.0
    if len(reference) == 1:
        return reference[0] - min(point[0] for point in inside)
    if len(reference) == 2:
        return _area(inside, reference)
    ordered = sorted(inside, key=lambda point: point[-1])
    volume = 0.0
    for number, point in enumerate(ordered):
        end = ordered[number + 1][-1] if number + 1 < len(ordered) else reference[-1]
        if end > point[-1]:
            slices = [other[:-1] for other in ordered[: number + 1]]
            volume += (end - point[-1]) * hypervolume(slices, reference[:-1])
    return volume


def _area(points: Sequence[Point], reference: Point) -> float:
    area, height = 0.0, reference[1]
    for x, y in sorted(points):
        if y < height:
            area += (reference[0] - x) * (height - y)
            height = y
    return area
