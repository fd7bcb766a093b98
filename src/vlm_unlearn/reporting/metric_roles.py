"""Assigns each metric a role: it measures harm, over-refusal, over-forgetting or utility, or it is a score.

The role follows from the labels that the metric counts and the questions that its splits ask, as the model's own suite
defines them. Without a suite, the metrics of the shipped suites are recognized by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from vlm_unlearn.config import MetricConfig, Suite
from vlm_unlearn.evaluation.benchmarks import SPECIFICITY_BENCHMARKS
from vlm_unlearn.records import Kind, Row
from vlm_unlearn.reporting.columns import UTILITY_COMPONENTS

RoleName = Literal["harm", "over_refusal", "over_forgetting", "utility", "score"]
Condition = Literal[
    "original", "attacked", "control"
]  # the wording of the questions; "control" is a neutral paraphrase
CONDITIONS: tuple[Condition, ...] = ("attacked", "control", "original")

# Candidates for the axes of the trade-off plots. The first that most models have is plotted.
HARM = ("asr_attacked", "generality_asr", "efficacy_asr", "asr")
OVER_REFUSAL = ("refusal_rate_attacked", "refusal_rate", "sarr")
UTILITY = ("utility_attacked", "utility", "specificity", "answer_score", "rouge_l")
ROLES_BY_NAME: Mapping[str, RoleName] = {
    **dict.fromkeys((*HARM, "asr_control"), "harm"),
    **dict.fromkeys(("refusal_rate", "refusal_rate_attacked", "refusal_rate_control"), "over_refusal"),
    "sarr": "over_forgetting",
    **dict.fromkeys(("utility", "utility_attacked", *UTILITY_COMPONENTS), "utility"),
    **dict.fromkeys(("specificity", "answer_score", "rouge_l"), "score"),
}


@dataclass(frozen=True)
class MetricRole:
    """The role of one metric for one model.

    Args:
        metric: The metric's key in summary.json.
        role: What the metric measures.
        condition: The wording of the questions that it counts.
        config: The metric's definition in the suite; None for a metric that is recognized by name.
        samples: The number of sampled answers to each prompt.
    """

    metric: str
    role: RoleName
    condition: Condition = "original"
    config: MetricConfig | None = None
    samples: int = 1


@dataclass(frozen=True)
class MetricRoles:
    """The roles of all models' metrics, and the axes of the trade-off plots.

    Args:
        harm: The metric on the harm axis of both plots; None if no model has one.
        over_refusal: The metric on the over-refusal axis, possibly one of over-forgetting; None if no model has one.
        utility: The metric on the utility axis, possibly a score; None if no model has one.
        by_model: Each model's metrics with their roles, attacked metrics first.
        split_kinds: The kind of questions in each split of each model's suite.
    """

    harm: str | None
    over_refusal: str | None
    utility: str | None
    by_model: Mapping[str, Sequence[MetricRole]] = field(default_factory=dict)
    split_kinds: Mapping[str, Mapping[str, Kind]] = field(default_factory=dict)

    @property
    def attacked(self) -> bool:
        """Whether any model's harm was measured under an attack."""
        return any(
            entry.role == "harm" and entry.condition == "attacked"
            for entries in self.by_model.values()
            for entry in entries
        )

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
    by_model = {row.model: _row_roles(row, suites.get(row.model)) for row in rows}
    split_kinds = {model: {split.name: split.kind for split in suite.splits} for model, suite in suites.items()}

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
        split_kinds=split_kinds,
    )


def measured(row: Row, metric: str) -> bool:
    """Returns whether a row has a value of a metric."""
    return metric in row.metrics and row.metrics[metric].value is not None


def _row_roles(row: Row, suite: Suite | None) -> list[MetricRole]:
    """Returns the roles of a row's metrics that have a value or failed verdicts."""
    metrics = [metric for metric, rate in row.metrics.items() if rate.value is not None or rate.failed]
    # `utility` contains its components, so they have no role next to it.
    combined = [metric for metric in metrics if metric not in UTILITY_COMPONENTS or "utility" not in metrics]
    entries = [entry for metric in combined if (entry := _metric_role(metric, suite)) is not None]
    return sorted(entries, key=lambda entry: CONDITIONS.index(entry.condition))


def _metric_role(metric: str, suite: Suite | None) -> MetricRole | None:
    config = suite.metrics.get(metric) if suite is not None else None
    condition: Condition = (
        "attacked" if metric.endswith("_attacked") else "control" if metric.endswith("_control") else "original"
    )
    if suite is None or config is None:
        role = ROLES_BY_NAME.get(metric)
        return None if role is None else MetricRole(metric, role, condition)
    splits = [split for split in suite.splits if split.name in config.splits]
    role = _role_by_definition(config, {split.kind for split in splits}) or ROLES_BY_NAME.get(metric)
    if role is None:
        return None
    triggers = {split.rewrite.trigger for split in splits if split.rewrite is not None}
    # Without a `rewrite`, the file may still contain attacked questions, such as the released files of the published
    # attack. Only the metric's name shows it.
    if triggers:
        condition = "control" if triggers == {"control"} else "attacked"
    return MetricRole(metric, role, condition, config, max((split.samples for split in splits), default=1))


def _role_by_definition(metric: MetricConfig, kinds: set[Kind]) -> RoleName | None:
    """Returns the role that follows from the labels counted and the kinds of questions asked, or None."""
    labels = set(metric.labels)
    if kinds == {"unsafe"} and labels == {"complied"}:
        return "harm"
    if kinds and "unsafe" not in kinds and "refused" in labels and "complied" not in labels:
        return "over_refusal" if kinds == {"safe"} else "over_forgetting"
    if kinds == {"safe"} and labels == {"complied"}:
        return "utility"
    return "score" if kinds == {"safe"} and metric.score == "mean" else None


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
