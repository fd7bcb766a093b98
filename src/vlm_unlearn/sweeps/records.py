"""The records of a sweep: the rates of a trial, and the result of all trials."""

from __future__ import annotations

import statistics
from typing import Any, Literal

from pydantic import Field

from vlm_unlearn.records import Rate, Record

State = Literal["complete", "failed", "aborted", "pruned", "running", "waiting"]
RESULT_FILE = "result.json"  # of a configuration
SWEEP_FILE = "sweep.json"  # of a sweep


class SeedResult(Record):
    """The rates of one trained model."""

    seed: int
    selection: dict[str, Rate] = Field(description="Rates on the questions by which trials are compared.")
    reported: dict[str, Rate] = Field(description="Rates on the other questions.")
    recovery: dict[str, float | None] = Field(
        default_factory=dict, description="Shares of the knowledge that attacks on the model bring back."
    )
    model: str | None = Field(
        default=None, description="Folder of the trained model, which `keep_models` may have deleted."
    )
    training_seconds: float = 0.0
    generation_seconds: float = 0.0


class ConfigurationResult(Record):
    """The result of a configuration, with one trained model for each seed."""

    digest: str
    seeds: list[SeedResult] = Field(default_factory=list)
    aborted: str | None = Field(default=None, description="Why the probe aborted the training.")
    seconds: float = Field(default=0.0, description="Wall time of training, generation and judging.")

    def mean(self, metric: str, reported: bool = False) -> float | None:
        """Returns the mean of a metric over the seeds, or None if it was not measured with each of them."""
        values = self.points(metric, reported)
        measured = [value for value in values if value is not None]
        return statistics.fmean(measured) if measured and len(measured) == len(values) else None

    def points(self, metric: str, reported: bool = False) -> list[float | None]:
        """Returns the values of a metric, one for each seed."""
        return [_value(result, metric, reported) for result in self.seeds]


def _value(result: SeedResult, metric: str, reported: bool) -> float | None:
    if metric in result.recovery:
        return result.recovery[metric]
    rate = (result.reported if reported else result.selection).get(metric)
    return None if rate is None else rate.value


class Trial(Record):
    """A trial of a sweep."""

    number: int
    params: dict[str, Any] = Field(description="The values of the space, by key of the recipe.")
    state: State
    values: dict[str, float] = Field(
        default_factory=dict,
        description="The objectives on the questions by which trials are compared. Means of seeds.",
    )
    reported: dict[str, float] = Field(
        default_factory=dict, description="All metrics on the other questions. Means of seeds."
    )
    feasible: bool = Field(default=True, description="Whether the constraints hold.")
    seeds: list[SeedResult] = Field(default_factory=list)
    error: str | None = None
    configuration: str | None = Field(default=None, description="Folder in `trials/`. Equal ones are trained once.")
    seconds: float = 0.0
    attempts: int = Field(default=1, description="More than one if a worker was killed.")


class SweepResult(Record):
    """All trials of a sweep, and those that no other dominates.

    Attributes:
        trials: The trials in their order.
        front: The numbers of the trials on the Pareto front, sorted by the first objective.
        base: The rates of the model before unlearning, by metric, on the reported questions.
    """

    name: str
    objectives: dict[str, Literal["min", "max"]]
    trials: list[Trial]
    front: list[int]
    base: dict[str, float] = Field(default_factory=dict)
    hypervolume: list[float] = Field(default_factory=list, description="After each trial, in the order of the trials.")
    importance: dict[str, dict[str, float]] = Field(
        default_factory=dict, description="Importance of each parameter for each objective, from Optuna."
    )
    choices: dict[str, int] = Field(default_factory=dict, description="The chosen trials, by the name of their recipe.")

    def trial(self, number: int) -> Trial:
        """Returns the trial with a number."""
        return next(trial for trial in self.trials if trial.number == number)

    def to_json(self) -> dict[str, Any]:
        """Returns the document of ``--json``: the front contains complete trials."""
        document = self.model_dump(mode="json")
        document["front"] = [trial.model_dump(mode="json") for trial in map(self.trial, self.front)]
        return document
