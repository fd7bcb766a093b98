"""What the results say about a judge. They contain its id, such as ``keyword`` or ``four_labels@model``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class JudgeFacts:
    """The facts about a judge on which the conclusions from its verdicts depend.

    Args:
        only_refusals: The judge detects refusals by keywords. It does not detect harm or correctness.
        language_model: A language model grades, so its agreement with people has to be measured.
        unnamed_model: The name of the language model is not recorded.
        all_facts: The judge contains every fact that it asks about, as no judge of the real world does.
    """

    only_refusals: bool = False
    language_model: bool = False
    unnamed_model: bool = False
    all_facts: bool = False


def judge_facts(judge_id: str) -> JudgeFacts:
    """Returns the facts about a judge from its id in summary.json, which `JudgeConfig.judge_id` builds."""
    name, separator, model = judge_id.partition("@")
    return JudgeFacts(
        only_refusals=name.startswith("keyword") and not separator,
        language_model=bool(separator),
        unnamed_model=model == "nobody",
        all_facts=name == "tiny_world",
    )
