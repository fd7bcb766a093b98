"""Lists the limits of a report's numbers. Each caveat is checked against the report's own data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vlm_unlearn.evaluation.judge_facts import judge_facts
from vlm_unlearn.evaluation.verdicts import metrics_without_judge
from vlm_unlearn.metrics.rates import rule_of_three
from vlm_unlearn.records import Row
from vlm_unlearn.reporting.columns import heading
from vlm_unlearn.reporting.formatting import by_keywords, count_failures, judges_of
from vlm_unlearn.reporting.metric_roles import MetricRoles
from vlm_unlearn.reporting.provenance import ModelProvenance, training_seed

FEW = 100  # answers or questions; below this, the report states the rate that zero hits cannot exclude
KEYWORD_JUDGE = (
    "A keyword judge graded. It counts every answer without a refusal as answered, whether the answer is harmful, "
    "wrong or off topic."
)
LISTED_ATTACKS = (
    "Only the listed attacks were measured. Other wordings, a prefilled answer, further training or quantization may "
    "recover the knowledge."
)
NO_ATTACK = (
    "No attack was measured. Answers to questions in their original wording do not show how the model answers other "
    "wordings."
)
NO_HARM_RATE = "No metric is a rate of harmful answers to unsafe questions, so these numbers do not show safety."
NO_UNSAFE_QUESTION = "No unsafe question was asked, so these numbers do not show safety."
AGREEMENT = (
    "This report does not measure whether people agree with the judge. The command vlm-unlearn judge agreement does."
)


def caveats(
    rows: Sequence[Row], roles: MetricRoles, sources: Mapping[str, ModelProvenance], left_out: Sequence[str]
) -> list[str]:
    """Returns the caveats of a report in sentences, the most important first.

    Args:
        rows: The rows of the summary.
        roles: The roles of their metrics.
        sources: The provenance of each model.
        left_out: The reasons for which comparisons were left out.
    """
    provenances = list(sources.values())
    return [
        *_judge_caveats(rows),
        *_question_caveats(rows, roles, provenances),
        *_training_caveats(provenances),
        *_generation_caveats(rows, provenances),
        *(f"Not compared: {reason}." for reason in left_out),
    ]


def _judge_caveats(rows: Sequence[Row]) -> list[str]:
    judges = judges_of(rows)
    lines = []
    if by_keywords(rows):
        lines.append(KEYWORD_JUDGE)
    if any(judge_facts(judge).all_facts for judge in judges):
        lines.append(
            "The judge contains every fact of the made-up world. No judge does so for the real world, so these numbers "
            "are only a demonstration."
        )
    models = [judge for judge in judges if judge_facts(judge).language_model]
    if models:
        lines.append(f"A language model graded ({', '.join(models)}). {AGREEMENT}")
    if any(judge_facts(judge).unnamed_model for judge in judges):
        lines.append("A judge of an unknown model graded some answers.")
    failed = count_failures(rows)
    if failed:
        lines.append(
            f"{failed:,} answers or verdicts failed, counted over all judges. Rates exclude them, except in the "
            "published counting and in metrics with on_error: count_as_miss."
        )
    return lines


def _question_caveats(rows: Sequence[Row], roles: MetricRoles, sources: Sequence[ModelProvenance]) -> list[str]:
    lines = []
    counts = [
        (row.metrics[entry.metric].n, entry)
        for row in rows
        for entry in roles.of(row.model, "harm")
        if row.metrics[entry.metric].n
    ]
    count, smallest = min(counts, key=lambda pair: pair[0], default=(0, None))
    if smallest is not None and count < FEW:
        per_response = smallest.config is not None and smallest.config.aggregate == "per_response"
        lines.append(
            f"{heading(smallest.metric)} is based on only {count:,} {'answers' if per_response else 'questions'}. "
            f"Zero hits among them do not exclude a rate of {100 * rule_of_three(count):.1f} %."
        )
    if roles.attacked:
        lines.append(LISTED_ATTACKS)
    elif roles.harm:
        lines.append(NO_ATTACK)
    elif any(split.kind == "unsafe" for source in sources for split in source.suite.splits):
        lines.append(NO_HARM_RATE)
    else:
        lines.append(NO_UNSAFE_QUESTION)
    if roles.over_refusal is None:
        lines.append("Over-refusal was not measured. A model that refuses everything would look equally safe.")
    if roles.utility is None:
        lines.append("Utility was not measured. A model that has lost all knowledge would look equally safe.")
    lines.append(
        "Each 95 % interval reflects the sampling of questions only and is not adjusted for multiple metrics. About 1 "
        "in 20 intervals will miss the true value."
    )
    return lines


def _training_caveats(sources: Sequence[ModelProvenance]) -> list[str]:
    if all(training_seed(source) is None for source in sources):
        return []
    return ["Each model was trained with one seed. The intervals do not include the variation between training seeds."]


def _generation_caveats(rows: Sequence[Row], sources: Sequence[ModelProvenance]) -> list[str]:
    lines = []
    unchecked = {row.model for row in rows if row.batching is None}
    if any(
        source.model in unchecked and source.suite.generation.batch_size > 1 and source.suite.generation.backend == "hf"
        for source in sources
    ):
        lines.append(
            "Answers were generated in batches. This report does not measure the effect of batching. "
            "The option --verify-batching N of vlm-unlearn evaluate does."
        )
    if any(source.suite.generation.backend == "openai" for source in sources):
        lines.append("A server generated the answers. The name of its model is recorded, but not its weights.")
    if any(source.suite.generation.temperature > 0 for source in sources):
        lines.append("Answers were sampled. Another sampling seed gives other answers.")
    without_judge = list(dict.fromkeys(name for source in sources for name in metrics_without_judge(source.suite)))
    if without_judge:
        lines.append(
            "Not measured, because no language model was configured as judge: "
            f"{', '.join(map(heading, without_judge))}."
        )
    return lines
