"""Lists the limits of a report's numbers. Each caveat is checked against the report's own data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vlm_unlearn.config import Suite
from vlm_unlearn.evaluation.judge_facts import judge_facts
from vlm_unlearn.evaluation.verdicts import metrics_without_judge
from vlm_unlearn.metrics.rates import rule_of_three
from vlm_unlearn.records import Row
from vlm_unlearn.reporting.columns import heading
from vlm_unlearn.reporting.formatting import by_keywords, count_failures, judges_of
from vlm_unlearn.reporting.metric_roles import MetricRoles
from vlm_unlearn.reporting.provenance import ModelProvenance
from vlm_unlearn.reporting.robustness.ranking import AttackedModel
from vlm_unlearn.reporting.robustness.text import tried_attacks
from vlm_unlearn.reporting.seeds import models_with_one_seed, seed_groups

FEW = 100  # answers or questions; below this, the report states the rate that zero hits cannot exclude
KEYWORD_JUDGE = (
    "A keyword judge graded. It counts every answer without a refusal as answered, whether the answer is harmful, "
    "wrong or off topic."
)
LISTED_ATTACKS = "Only the listed attacks were measured. Other wordings may recover the knowledge."
NOT_ATTACKED = (
    "This report contains no attacks on the models themselves. A prefilled answer, further training or quantization "
    "may recover the knowledge. The command vlm-unlearn robustness measures this."
)
NOT_ATTACKED_BUT_PREFILLED = (
    "This report contains no attacks on the models themselves. Other beginnings of the answer, further training or "
    "quantization may recover the knowledge. The command vlm-unlearn robustness measures this."
)
NO_ATTACK = (
    "No attack on the wording was measured. Answers to questions in their original wording do not show how the model "
    "answers other wordings."
)
NO_HARM_RATE = "No metric is a rate of harmful answers to unsafe questions, so these numbers do not show safety."
NO_UNSAFE_QUESTION = "No unsafe question was asked, so these numbers do not show safety."
ALL_FACTS = (
    "The judge contains every fact of the made-up world. No judge does so for the real world, so these numbers are "
    "only a demonstration."
)
NO_OVER_REFUSAL = "Over-refusal was not measured. A model that refuses everything would look equally safe."
NO_UTILITY = "Utility was not measured. A model that has lost all knowledge would look equally safe."
INTERVALS = (
    "Each 95 % interval reflects the sampling of questions only and is not adjusted for multiple metrics. About 1 in "
    "20 intervals will miss the true value."
)
SOME_SEEDS = "The intervals do not include the variation between seeds, which the section Training seeds shows."
ONE_SEED = "Each model was trained with one seed. The intervals do not include the variation between training seeds."
BATCHES = (
    "Answers were generated in batches. This report does not measure the effect of batching. The option "
    "--verify-batching N of vlm-unlearn evaluate does."
)
SERVER = "A server generated the answers. The name of its model is recorded, but not its weights."
IMPORTED = "Another program wrote some answers. Its weights, prompts and decoding are not recorded"
SAMPLED = "Answers were sampled. Another sampling seed gives other answers."
AGREEMENT = (
    "This report does not measure whether people agree with the judge. The command vlm-unlearn judge agreement does."
)


def caveats(
    rows: Sequence[Row],
    roles: MetricRoles,
    sources: Mapping[str, ModelProvenance],
    left_out: Sequence[str],
    attacked: Sequence[AttackedModel] = (),
) -> list[str]:
    """Returns the caveats of a report in sentences, the most important first.

    Args:
        rows: The rows of the summary.
        roles: The roles of their metrics.
        sources: The provenance of each model.
        left_out: The reasons for which comparisons were left out.
        attacked: The models with robustness results.
    """
    suites = [source.suite for source in sources.values()]
    generated = {model: source.suite for model, source in sources.items() if not source.imported_files}
    imported = [model for model in sources if model not in generated]
    judges = {judge: judge_facts(judge) for judge in judges_of(rows)}
    language_models = ", ".join(judge for judge, facts in judges.items() if facts.language_model)
    failed = count_failures(rows)
    unchecked = {row.model for row in rows if row.batching is None}
    batched = {
        model
        for model, suite in generated.items()
        if suite.generation.batch_size > 1 and suite.generation.backend == "hf"
    }
    without_judge = dict.fromkeys(name for suite in suites for name in metrics_without_judge(suite))
    rules = [
        (by_keywords(rows), KEYWORD_JUDGE),
        (any(facts.all_facts for facts in judges.values()), ALL_FACTS),
        (language_models, f"A language model graded ({language_models}). {AGREEMENT}"),
        (any(facts.unnamed_model for facts in judges.values()), "A judge of an unknown model graded some answers."),
        (
            failed,
            f"{failed:,} answers or verdicts failed, counted over all judges. Rates exclude them, except in the "
            "published counting and in metrics with on_error: count_as_miss.",
        ),
        *_question_caveats(rows, roles, suites, attacked),
        *_seed_caveats(sources),
        (unchecked & batched, BATCHES),
        (imported, f"{IMPORTED} ({', '.join(imported)})."),
        (any(suite.generation.backend == "openai" for suite in generated.values()), SERVER),
        (
            any(suite.generation.temperature > 0 or _has_attack(suite, "sampling") for suite in generated.values()),
            SAMPLED,
        ),
        (
            without_judge,
            "Not measured, because no language model was configured as judge: "
            f"{', '.join(map(heading, without_judge))}.",
        ),
    ]
    return [text for applies, text in rules if applies] + [f"Not compared: {reason}." for reason in left_out]


def _seed_caveats(sources: Mapping[str, ModelProvenance]) -> list[tuple[object, str]]:
    """Returns the caveats about training seeds, each after a value that is true if it applies."""
    single, groups = models_with_one_seed(sources), seed_groups(sources)
    some = f"These models were trained with one seed: {', '.join(single)}. {SOME_SEEDS}"
    return [(single and not groups, ONE_SEED), (groups and not single, SOME_SEEDS), (groups and single, some)]


def common_attacks(suites: Sequence[Suite]) -> set[str]:
    """Returns the names of the attacks that every suite applies, without those that are only a control."""
    names = {attack.name for suite in suites for split in suite.splits for attack in split.attacks}
    return {name for name in names if all(_has_attack(suite, name) for suite in suites)}


def _has_attack(suite: Suite, name: str) -> bool:
    """Returns whether a suite applies an attack, and not only its control."""
    return any(attack.name == name and not attack.is_control for split in suite.splits for attack in split.attacks)


def _question_caveats(
    rows: Sequence[Row], roles: MetricRoles, suites: Sequence[Suite], attacked: Sequence[AttackedModel]
) -> list[tuple[object, str]]:
    """Returns the caveats about questions and attacks, each after a value that is true if it applies."""
    counts = [(row.metrics[entry.metric].n, entry) for row in rows for entry in roles.of(row.model, "harm")]
    few = []
    count, smallest = min((pair for pair in counts if pair[0]), key=lambda pair: pair[0], default=(0, None))
    if smallest is not None and count < FEW:
        per_response = smallest.config is not None and smallest.config.aggregate == "per_response"
        few = [
            f"{heading(smallest.metric)} is based on only {count:,} {'answers' if per_response else 'questions'}. "
            f"Zero hits among them do not exclude a rate of {100 * rule_of_three(count):.1f} %."
        ]
    unsafe = any(split.kind == "unsafe" for suite in suites for split in suite.splits)
    has_prefill = bool(suites) and all(_has_attack(suite, "prefill") for suite in suites)
    missing = NOT_ATTACKED_BUT_PREFILLED if has_prefill else NOT_ATTACKED
    tried = tried_attacks(attacked, len(rows), common_attacks(suites)) if attacked else missing
    listed = f"{LISTED_ATTACKS} {tried}"
    attacks = listed if roles.attacked or attacked else f"{NO_ATTACK} {missing}"
    safety = attacks if roles.attacked or roles.harm else NO_HARM_RATE if unsafe else NO_UNSAFE_QUESTION
    return [
        *((True, text) for text in (*few, safety)),
        (attacked and not roles.attacked, NO_ATTACK),
        (roles.over_refusal is None, NO_OVER_REFUSAL),
        (roles.utility is None, NO_UTILITY),
        (True, INTERVALS),
    ]
