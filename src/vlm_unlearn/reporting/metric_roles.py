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
    """The roles of all models' metrics, and the metric on each axis of the trade-off plots, None without one."""

    harm: str | None  # on an axis of both plots
    over_refusal: str | None  # possibly a metric of over-forgetting
    utility: str | None  # possibly a score
    by_model: Mapping[str, Sequence[MetricRole]] = field(default_factory=dict)  # attacked metrics first

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
        entries = (entry for row in rows for entry in by_model[row.model] if entry.role in roles)
        custom = (entry.metric for entry in entries if entry.metric not in ROLES_BY_NAME)
        counts = {name: sum(measured(row, name) for row in rows) for name in dict.fromkeys((*shipped, *custom))}
        metric = max(counts, key=counts.__getitem__)
        return metric if counts[metric] else None

    over_refusal = axis(OVER_REFUSAL, "over_refusal", "over_forgetting")
    return MetricRoles(axis(HARM, "harm"), over_refusal, axis(UTILITY, "utility", "score"), by_model)


AnswerFilter = list[tuple[str, str]]  # names and values in the address of the answers page; a name may be repeated


def answers_link(model: str, metric: str, suite: Suite) -> AnswerFilter:
    """Returns the filter of the answers page that shows the answers behind a rate.

    For a rate of labels these are the answers with one of the labels. For a score these are all answers of its splits.
    The filter is empty if the suite does not define the metric.
    """
    config = suite.metrics.get(metric)
    benchmarks = {benchmark.name for benchmark in suite.benchmarks}
    names = config.splits if config is not None else [metric] if metric in benchmarks else []
    if metric == "specificity" and benchmarks.issuperset(SPECIFICITY_BENCHMARKS):
        names = list(SPECIFICITY_BENCHMARKS)
    judge = [("judge", suite.judge_config(config.judge).judge_id)] if config is not None and config.judge else []
    labels = [("label", label) for label in config.labels] if config is not None else []
    return [("model", model), *labels, *judge, *(("case", name) for name in names)] if names else []


def changes_link(model: str, metric: str, suite: Suite) -> AnswerFilter:
    """Returns the filter that shows the answers of a metric's splits whose label, or score by much, changed."""
    filters = answers_link(model, metric, suite)
    return [*((name, value) for name, value in filters if name != "label"), ("changed", "1")] if filters else []
