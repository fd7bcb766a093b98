"""Chooses the axes of the trade-off plots, and the links from rates to the answers behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vlm_unlearn.config import Suite
from vlm_unlearn.evaluation.benchmarks import SPECIFICITY_BENCHMARKS
from vlm_unlearn.evaluation.metric_roles import (
    HARM,
    OVER_REFUSAL,
    ROLES_BY_NAME,
    UTILITY,
    MetricRole,
    RoleName,
    measured,
    metric_roles,
)
from vlm_unlearn.records import Row


@dataclass(frozen=True)
class MetricRoles:
    """The roles of all models' metrics, and the axes of the trade-off plots.

    Args:
        harm: The metric on the harm axis of both plots; None if no model has one.
        over_refusal: The metric on the over-refusal axis, possibly one of over-forgetting; None if no model has one.
        utility: The metric on the utility axis, possibly a score; None if no model has one.
        by_model: Each model's metrics with their roles, attacked metrics first.
    """

    harm: str | None
    over_refusal: str | None
    utility: str | None
    by_model: Mapping[str, Sequence[MetricRole]] = field(default_factory=dict)

    @property
    def attacked(self) -> bool:
        """Whether any model's harm was measured under an attack."""
        return any(entry.condition == "attacked" for model in self.by_model for entry in self.of(model, "harm"))

    def of(self, model: str, role: RoleName) -> list[MetricRole]:
        """Returns a model's metrics with one role."""
        return [entry for entry in self.by_model.get(model, ()) if entry.role == role]


def assign_roles(rows: Sequence[Row], suites: Mapping[str, Suite]) -> MetricRoles:
    """Assigns roles to the metrics of all rows and chooses the axes of the trade-off plots.

    Args:
        rows: The rows of a summary.
        suites: The suite of each model. A model without one gets its roles by the names of its metrics.

    Returns:
        The roles. An axis is the metric that most rows have a value of. Of equals, the metrics of the shipped suites
        come first, in the order of `HARM`, `OVER_REFUSAL` and `UTILITY`.
    """
    by_model = {row.model: metric_roles(row, suites.get(row.model)) for row in rows}

    def axis(shipped: Sequence[str], *roles: RoleName) -> str | None:
        custom = (
            entry.metric
            for row in rows
            for entry in by_model[row.model]
            if entry.role in roles and entry.metric not in ROLES_BY_NAME
        )
        counts = {name: sum(measured(row, name) for row in rows) for name in dict.fromkeys((*shipped, *custom))}
        highest = max(counts.values(), default=0)
        return next((name for name in counts if highest and counts[name] == highest), None)

    return MetricRoles(
        axis(HARM, "harm"),
        axis(OVER_REFUSAL, "over_refusal", "over_forgetting"),
        axis(UTILITY, "utility", "score"),
        by_model=by_model,
    )


AnswerFilter = list[tuple[str, str]]  # names and values in the address of the answers page; a name may be repeated


def answers_link(model: str, metric: str, suite: Suite) -> AnswerFilter:
    """Returns the filter of the answers page that shows the answers behind a rate.

    For a rate of labels these are the answers with one of the labels. For a score these are all answers of its splits.
    The filter is empty if the suite does not define the metric.
    """
    splits = link_splits(metric, suite)
    if not splits:
        return []
    config = suite.metrics.get(metric)
    judge = [("judge", suite.judge_config(config.judge).judge_id)] if config is not None and config.judge else []
    labels = [("label", label) for label in config.labels] if config is not None else []
    return [("model", model), *labels, *judge, *splits]


def changes_link(model: str, metric: str, suite: Suite) -> AnswerFilter:
    """Returns the filter that shows the answers of a metric's splits whose label, or score by much, changed."""
    filters = answers_link(model, metric, suite)
    return [*((name, value) for name, value in filters if name != "label"), ("changed", "1")] if filters else []


def link_splits(metric: str, suite: Suite) -> AnswerFilter:
    """Returns the filter for the splits or benchmarks that a metric counts."""
    config = suite.metrics.get(metric)
    benchmarks = [benchmark.name for benchmark in suite.benchmarks]
    names = config.splits if config is not None else [name for name in benchmarks if name == metric]
    if metric == "specificity" and set(SPECIFICITY_BENCHMARKS) <= set(benchmarks):
        names = list(SPECIFICITY_BENCHMARKS)
    return [("case", name) for name in names]
