"""What a report's numbers can't tell, said of this report and no other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vlm_unlearn.evaluation.verdicts import metrics_without_judge
from vlm_unlearn.metrics.rates import rule_of_three
from vlm_unlearn.records import Row
from vlm_unlearn.reporting.columns import heading
from vlm_unlearn.reporting.formatting import by_keywords, count_failures, judges_of
from vlm_unlearn.reporting.metric_roles import MetricRoles
from vlm_unlearn.reporting.provenance import ModelProvenance, training_seed

FEW = 100  # questions; with fewer, what a rate of 0 can hide is said


def caveats(
    rows: Sequence[Row], roles: MetricRoles, sources: Mapping[str, ModelProvenance], left_out: Sequence[str]
) -> list[str]:
    """Sentences, the gravest first."""
    asked = list(sources.values())
    return [
        *_judges(rows),
        *_questions(rows, roles, asked),
        *_training(asked),
        *_generation(rows, asked),
        *(f"Not compared: {reason}." for reason in left_out),
    ]


def _judges(rows: Sequence[Row]) -> list[str]:
    judges = judges_of(rows)
    found = []
    if by_keywords(rows):
        found.append(
            "Keywords judged: an answer without a refusal counts as an answer, whether it is harmful, wrong or beside the point."
        )
    if any(judge == "tiny_world" for judge in judges):
        found.append(
            "The judge knows every fact of the made-up world; of a real one no judge does. Read this as a rehearsal."
        )
    models = [judge for judge in judges if "@" in judge]
    if models:
        found.append(
            f"A language model judged ({', '.join(models)}), and this report doesn't show whether people agree with it; "
            "vlm-unlearn judge agreement tells."
        )
    if any(judge.endswith("@nobody") for judge in judges):
        found.append("A judge of no known model graded.")
    failed = count_failures(rows)
    if failed:
        found.append(
            f"{failed:,} answers or verdicts failed, over all judges; they are in no rate but the published ones."
        )
    return found


def _questions(rows: Sequence[Row], roles: MetricRoles, sources: Sequence[ModelProvenance]) -> list[str]:
    found = []
    counts = [
        (row.metrics[part.metric].n, part)
        for row in rows
        for part in roles.of(row.model, "harm")
        if row.metrics[part.metric].n
    ]
    few, least = min(counts, key=lambda count: count[0], default=(0, None))
    if least is not None and few < FEW:
        what = "answers" if least.config is not None and least.config.aggregate == "per_response" else "questions"
        found.append(
            f"{heading(least.metric)} rests on {few:,} {what}: 0 of them can hide a rate of up to {100 * rule_of_three(few):.1f} %."
        )
    if roles.attacked:
        found.append(
            "Only the attacks shown were tried: other wordings, a prefilled answer, further training or quantisation "
            "may bring the knowledge back."
        )
    elif roles.harm:
        found.append("No attack was tried: how a model answers as asked says nothing of how it answers otherwise.")
    elif any(case.kind == "unsafe" for source in sources for case in source.suite.splits):
        found.append(
            "No rate tells how many unsafe questions were answered with the harm: this says nothing of safety."
        )
    else:
        found.append("No unsafe question was asked: this says nothing of safety.")
    if roles.over_refusal is None:
        found.append("Over-refusal was not measured: a model that refuses everything would look as safe.")
    if roles.utility is None:
        found.append("Use was not measured: a model that knows nothing any more would look as safe.")
    found.append(
        "Each interval covers the choice of questions, and each rate by itself: of 20, one lies outside by chance."
    )
    return found


def _training(sources: Sequence[ModelProvenance]) -> list[str]:
    seeds = [seed for source in sources if (seed := training_seed(source)) is not None]
    if not seeds:
        return []
    return ["Each model was trained once: another seed gives another model, and no interval covers that."]


def _generation(rows: Sequence[Row], sources: Sequence[ModelProvenance]) -> list[str]:
    found = []
    unchecked = {row.model for row in rows if row.batching is None}
    if any(
        source.model in unchecked and source.suite.generation.batch_size > 1 and source.suite.generation.backend == "hf"
        for source in sources
    ):
        found.append(
            "Answers were made in batches, and this report doesn't show what that changes; evaluate with --verify-batching N tells."
        )
    if any(source.suite.generation.backend == "openai" for source in sources):
        found.append("A server answered: its model's name is known, its weights are not.")
    if any(source.suite.generation.temperature > 0 for source in sources):
        found.append("Answers were sampled: another sampling seed gives other answers.")
    open_metrics = list(dict.fromkeys(name for source in sources for name in metrics_without_judge(source.suite)))
    if open_metrics:
        found.append(f"Not measured, for want of a language model as judge: {', '.join(map(heading, open_metrics))}.")
    return found
