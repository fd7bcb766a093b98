"""Which of a report's metrics tells the harm, which the over-refusal and which the use.

Shipped metrics are known by name, a suite's own by what they count.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from vlm_unlearn.config import MetricConfig, Suite
from vlm_unlearn.records import Kind, Row

# The first that was measured counts: an attack before a question as asked.
HARM = ("asr_attacked", "generality_asr", "efficacy_asr", "asr")
PRUDENCE = ("refusal_rate_attacked", "refusal_rate", "sarr")
USE = ("utility_attacked", "utility", "specificity", "answer_score", "rouge_l")


@dataclass(frozen=True)
class Roles:
    """Names of metrics; None where nothing of the kind was measured."""

    harm: str | None
    prudence: str | None
    use: str | None
    kinds: Mapping[str, Kind] = field(default_factory=dict)  # of each case

    @property
    def attacked(self) -> bool:
        """Whether the harm was measured under an attack."""
        return self.harm == "asr_attacked"


def roles_of(rows: Sequence[Row], suites: Iterable[Suite]) -> Roles:
    """The metrics of the trade-off: in each role the first that most rows have."""
    own: dict[str, str] = {}
    of_all: dict[str, Kind] = {}
    for suite in suites:
        kinds = {case.name: case.kind for case in suite.cases}
        of_all |= kinds
        for name, metric in suite.metrics.items():
            role = _role(metric, {kinds[case] for case in metric.cases})
            if role:
                own.setdefault(name, role)

    def first(known: Sequence[str], role: str) -> str | None:
        candidates = [*known, *(name for name, its in own.items() if its == role and name not in known)]
        counts = {name: sum(_measured(row, name) for row in rows) for name in candidates}
        best = max(counts.values(), default=0)
        return next((name for name in candidates if best and counts[name] == best), None)

    return Roles(first(HARM, "harm"), first(PRUDENCE, "prudence"), first(USE, "use"), of_all)


def _measured(row: Row, metric: str) -> bool:
    return metric in row.metrics and row.metrics[metric].value is not None


def _role(metric: MetricConfig, kinds: set[Kind]) -> str:
    """What a metric of a suite's own tells, by its labels and what was asked; empty where that is none of the three."""
    labels = set(metric.labels)
    if kinds == {"unsafe"} and labels == {"complied"}:
        return "harm"
    if kinds and "unsafe" not in kinds and "refused" in labels and "complied" not in labels:
        return "prudence"
    return "use" if kinds == {"safe"} and (labels == {"complied"} or metric.score == "mean") else ""


def answers_link(model: str, metric: MetricConfig) -> dict[str, str]:
    """Which answers a metric counts, as the page of answers filters them; a case or a label is left out where there are several."""
    case = {"case": metric.cases[0]} if len(metric.cases) == 1 else {}
    return {"model": model, **case, **({"label": metric.labels[0]} if len(metric.labels) == 1 else {})}


def metric_configs(suites: Mapping[str, Suite]) -> dict[tuple[str, str], MetricConfig]:
    """How each model's suite counts each metric."""
    return {(model, name): metric for model, suite in suites.items() for name, metric in suite.metrics.items()}
