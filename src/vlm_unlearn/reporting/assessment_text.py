"""Words for the assessments of models, which summary.json contains as rates and facts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vlm_unlearn.evaluation.judge_facts import judge_facts
from vlm_unlearn.metrics.rates import group_count
from vlm_unlearn.records import Condition, FactKind, Level, RateKind, Reason, Row
from vlm_unlearn.reporting.columns import heading
from vlm_unlearn.reporting.formatting import bounds, interval, percent

MARKS: Mapping[Level, str] = {"good": "✓", "mixed": "!", "bad": "✕", "unknown": "?"}  # the best level first
SENTENCES: Mapping[RateKind | FactKind, str] = {
    "harm": "The {harm} is {rate} on {wording}unsafe questions{original}.",
    "over_refusal": "It refuses {value} of the {wording}harmless questions.",
    "utility": "It answers {value} of the {wording}harmless questions {correctly}.",
    "over_forgetting": "It does not answer {value} of the unsafe questions on a benign image (over-forgetting).",
    "degenerate_harmless": "Of the answers to harmless questions, {value} are degenerate.",
    "degenerate_unsafe": "Of the answers to unsafe questions, {value} are degenerate.",
    "degenerate": "Of all answers, {value} are degenerate.",
    "score": "{metric} is {value}.",
    "rate": "{metric} is {rate}.",
    "lost_verdicts": "{failed} verdicts on {metric} failed, which affects {value} of its questions or answers.",
    "failed_verdicts": "If the {failed} failed verdicts on {metric} were harm, it could be {value}, above "
    "{threshold:.0f}\u00a0%.",
    "recovered": "Of the attacks on the model, {attack} brings most back: {rate} of the base's {answers}.",
    "harm_under_attack": "Under {attack}, the worst attack on the model, the {harm} is {rate}.",
    "no_harm": "No metric measures harm.",
    "no_rate": "No metric has a rate.",
    "no_attack": "No attack on the wording was measured.",
    "no_over_refusal": "Over-refusal was not measured.",
    "no_utility": "Utility was not measured.",
    "only_scores": "Utility was measured by scores only.",
    "wide_interval": "The interval does not exclude {threshold:.0f}\u00a0%.",
    "keyword_judge": "A keyword judge detects refusals, not harm.",
    "no_never_knew": "Without a model that never knew, this includes what the attack teaches anew.",
    "no_conclusive_attack": "No attack on the model allows a conclusion.",
}
WORDINGS: Mapping[Condition | None, str] = {"attacked": "attacked ", "control": "paraphrased "}


def reason_text(reason: Reason) -> str:
    """Returns a reason as a sentence."""
    by_keywords = judge_facts(reason.judge).only_refusals
    # A recovered share is no rate of hits, so the rule of three does not hold for it.
    limits = interval(reason) if reason.kind == "recovered" else bounds(reason)
    is_bound = reason.kind != "recovered" and group_count(reason) is not None
    return SENTENCES[reason.kind].format(
        harm="non-refusal rate" if by_keywords else "harm rate",
        correctly="without a refusal" if by_keywords else "correctly",
        wording=WORDINGS.get(reason.condition, ""),
        original=" in their original wording" if reason.condition == "original" else "",
        metric=f"the attack {reason.attack}" if reason.attack else heading(reason.metric),
        attack=reason.attack,
        answers="answers" if by_keywords else "harmful answers",
        value=percent(reason),
        rate=f"{percent(reason)} {f'({limits})' if is_bound else limits}".rstrip(),
        failed=f"{reason.failed:,}",
        threshold=100 * (reason.threshold or 0.0),
    )


def assessment_text(row: Row) -> str:
    """Returns the assessment of a model with its reasons as a paragraph, or an empty string without one."""
    if row.assessment is None:
        return ""
    return " ".join([f"{row.model} is {row.assessment.conclusion}.", *map(reason_text, row.assessment.reasons)])


def safest_first(rows: Sequence[Row]) -> list[Row]:
    """Returns the assessed rows sorted by level, best first. Models of one level keep their order."""
    return [row for level in MARKS for row in rows if row.assessment is not None and row.assessment.level == level]
