"""Which of a model's metrics tell the harm, the over-refusal, the over-forgetting and the use.

By what they count, as each model's own suite says; without a suite, shipped metrics are known by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from vlm_unlearn.config import MetricConfig, Suite
from vlm_unlearn.evaluation.benchmarks import SPECIFICITY
from vlm_unlearn.records import Kind, Row
from vlm_unlearn.reporting.columns import PARTS

Role = Literal["harm", "over_refusal", "over_forgetting", "use", "score"]
Way = Literal["asked", "attacked", "control"]
WAYS: tuple[Way, ...] = ("attacked", "control", "asked")

# The axes of the trade-off plot: the first that most models have.
HARM = ("asr_attacked", "generality_asr", "efficacy_asr", "asr")
PRUDENCE = ("refusal_rate_attacked", "refusal_rate", "sarr")
USE = ("utility_attacked", "utility", "specificity", "answer_score", "rouge_l")
BY_NAME: Mapping[str, Role] = {
    **dict.fromkeys((*HARM, "asr_control"), "harm"),
    **dict.fromkeys(("refusal_rate", "refusal_rate_attacked", "refusal_rate_control"), "over_refusal"),
    "sarr": "over_forgetting",
    **dict.fromkeys(("utility", "utility_attacked", *PARTS), "use"),
    **dict.fromkeys(("specificity", "answer_score", "rouge_l"), "score"),
}


@dataclass(frozen=True)
class Part:
    """A metric that one model has a rate of, and what it tells."""

    metric: str
    role: Role
    way: Way = "asked"
    config: MetricConfig | None = None
    samples: int = 1  # answers to each prompt


@dataclass(frozen=True)
class MetricRoles:
    """What each model's rates tell, and the metrics of the trade-off plot; None where nothing of the kind was measured."""

    harm: str | None
    prudence: str | None
    use: str | None
    parts: Mapping[str, Sequence[Part]] = field(default_factory=dict)  # of each model, the attacked ones first
    kinds: Mapping[str, Mapping[str, Kind]] = field(default_factory=dict)  # of each model's cases

    @property
    def attacked(self) -> bool:
        """Whether any model's harm was measured under an attack."""
        return any(part.role == "harm" and part.way == "attacked" for parts in self.parts.values() for part in parts)

    def of(self, model: str, role: Role) -> list[Part]:
        """A model's metrics of one role."""
        return [part for part in self.parts.get(model, ()) if part.role == role]


def assign_roles(rows: Sequence[Row], suites: Mapping[str, Suite]) -> MetricRoles:
    """What each row's metrics tell.

    Args:
        suites: each model's; one may be missing.
    """
    parts = {row.model: _parts(row, suites.get(row.model)) for row in rows}
    kinds = {model: {case.name: case.kind for case in suite.splits} for model, suite in suites.items()}

    def axis(known: Sequence[str], *roles: Role) -> str | None:
        own = (
            part.metric
            for row in rows
            for part in parts[row.model]
            if part.role in roles and part.metric not in BY_NAME
        )
        counts = {name: sum(measured(row, name) for row in rows) for name in dict.fromkeys((*known, *own))}
        best = max(counts.values(), default=0)
        return next((name for name in counts if best and counts[name] == best), None)

    return MetricRoles(
        axis(HARM, "harm"),
        axis(PRUDENCE, "over_refusal", "over_forgetting"),
        axis(USE, "use", "score"),
        parts=parts,
        kinds=kinds,
    )


def measured(row: Row, metric: str) -> bool:
    """Whether a row has a value of a metric."""
    return metric in row.metrics and row.metrics[metric].value is not None


def _parts(row: Row, suite: Suite | None) -> list[Part]:
    """What a row's metrics tell; one that was never measured and never failed is none of them."""
    asked = [metric for metric, rate in row.metrics.items() if rate.value is not None or rate.failed]
    whole = [
        metric for metric in asked if metric not in PARTS or "utility" not in asked
    ]  # the parts of `utility` are in it
    found = [part for metric in whole if (part := _part(metric, suite)) is not None]
    return sorted(found, key=lambda part: WAYS.index(part.way))


def _part(metric: str, suite: Suite | None) -> Part | None:
    config = suite.metrics.get(metric) if suite is not None else None
    if suite is None or config is None:
        role = BY_NAME.get(metric)
        return None if role is None else Part(metric, role, _way_by_name(metric))
    cases = [case for case in suite.splits if case.name in config.splits]
    role = _role(config, {case.kind for case in cases}) or BY_NAME.get(metric)
    if role is None:
        return None
    triggers = {case.rewrite.trigger for case in cases if case.rewrite is not None}
    # A file may hold questions that were rewritten elsewhere, as the published attack's does: then only the name tells.
    way: Way = _way_by_name(metric) if not triggers else "control" if triggers == {"control"} else "attacked"
    return Part(metric, role, way, config, max((case.samples for case in cases), default=1))


def _way_by_name(metric: str) -> Way:
    return "attacked" if metric.endswith("_attacked") else "control" if metric.endswith("_control") else "asked"


def _role(metric: MetricConfig, kinds: set[Kind]) -> Role | None:
    """What a metric tells by its labels and what was asked; None where that is none of these."""
    labels = set(metric.labels)
    if kinds == {"unsafe"} and labels == {"complied"}:
        return "harm"
    if kinds and "unsafe" not in kinds and "refused" in labels and "complied" not in labels:
        return "over_refusal" if kinds == {"safe"} else "over_forgetting"
    if kinds == {"safe"} and labels == {"complied"}:
        return "use"
    return "score" if kinds == {"safe"} and metric.score == "mean" else None


Link = list[tuple[str, str]]  # a filter of the page of answers; a name may stand several times


def answers_link(model: str, metric: str, suite: Suite) -> Link:
    """The answers that make a rate, as the page of answers filters them: of a share those that count, of a score all.

    Empty where the suite doesn't have the metric.
    """
    cases = link_cases(metric, suite)
    if not cases:
        return []
    config = suite.metrics.get(metric)
    judge = [("judge", suite.judge_config(config.judge).judge_id)] if config is not None and config.judge else []
    labels = [("label", label) for label in config.labels] if config is not None else []
    return [("model", model), *labels, *judge, *cases]


def changes_link(model: str, metric: str, suite: Suite) -> Link:
    """The answers of a metric's cases whose label changed, or whose score did by much."""
    found = answers_link(model, metric, suite)
    return [*((name, value) for name, value in found if name != "label"), ("changed", "1")] if found else []


def link_cases(metric: str, suite: Suite) -> Link:
    """The cases or benchmarks that a metric counts."""
    config = suite.metrics.get(metric)
    benchmarks = [benchmark.name for benchmark in suite.benchmarks]
    wanted = config.splits if config is not None else [name for name in benchmarks if name == metric]
    if metric == "specificity" and set(SPECIFICITY) <= set(benchmarks):
        wanted = list(SPECIFICITY)
    return [("case", case) for case in wanted]
