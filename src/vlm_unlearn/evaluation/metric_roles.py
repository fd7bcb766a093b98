"""Assigns each metric a role: it measures harm, over-refusal, over-forgetting or utility, or it is a score.

The role follows from the labels that the metric counts and the questions that its splits ask, as the model's own suite
defines them. Without a suite, the metrics of the shipped suites are recognized by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from vlm_unlearn.config import MetricConfig, Suite
from vlm_unlearn.records import Condition, Kind, Row

RoleName = Literal["harm", "over_refusal", "over_forgetting", "utility", "score"]
CONDITIONS: tuple[Condition, ...] = ("attacked", "control", "original")

# Components of the demo's `utility`, which is an average over its splits.
UTILITY_COMPONENTS = ("utility_vlguard", "utility_safe_eraser")
# Metrics of the shipped suites, the most informative first. The report plots the first that most models have.
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


def measured(row: Row, metric: str) -> bool:
    """Returns whether a row has a value of a metric."""
    return metric in row.metrics and row.metrics[metric].value is not None


def metric_roles(row: Row, suite: Suite | None) -> list[MetricRole]:
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
    attacked = [split for split in splits if split.attacks]
    # Without an attack, the file may still contain attacked questions, such as the released files of the published
    # attack. Only the metric's name shows it.
    if attacked:
        condition = "control" if all(split.is_control for split in attacked) else "attacked"
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
