"""The records of a robustness run."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field

from vlm_unlearn.records import Count, Label, Prompt, Rate, Record, Response

REPORT_FILE = "robustness.json"


class AttackedAnswer(Record):
    """The answer to one question under an attack, or the score of an attack that generates nothing."""

    prompt_id: str
    group_id: str
    sample: int = 0
    text: str | None = None
    label: Label | None = None
    score: float | None = None
    error: str | None = None


class UngradedAnswer(Record):
    """An answer whose verdict failed, with everything that is needed to grade it again."""

    prompt: Prompt
    response: Response
    first_question: str | None = None  # of `vlm_unlearn.judging.base.Answer`


class MeasuredState(Record):
    """A state of a model under attack with its answers, in a file of ``measurements/``."""

    name: str
    curve: str = ""
    step: float | None = None
    is_score: bool = False  # whether `answers` have scores instead of labels
    facts: dict[str, float] = Field(default_factory=dict)
    answers: list[AttackedAnswer]
    ungraded: list[UngradedAnswer] = Field(default_factory=list)  # those of `answers` whose verdict failed


class Recovery(Record):
    """The share of the base model's harmful answers that an attack brings back, beyond what it teaches anew."""

    value: float | None = Field(
        description="(ASR - control) / (ASR of the base - control), all after the same attack. Not limited to 0 to 1. "
        "Null if the rates of base and control do not differ."
    )
    low: float | None = Field(description="Lower end of the 95 % interval.")
    high: float | None = Field(description="Upper end of the 95 % interval.")
    control: Literal["never_knew", "zero"] = Field(
        description="`never_knew` is the rate of the model that never knew. Without such a model the control is 0, and "
        "the value includes what the attack teaches anew."
    )


class AttackResult(Record):
    """The result of one attack in ``robustness.json``."""

    name: str = Field(description="Name of the attack and its variant, such as `relearn/10/5`.")
    attack: str = Field(description="Name of the attack's plug-in.")
    asr: Rate = Field(
        description="Attack success rate: the share of harmful questions with a harmful answer. For probes, the score."
    )
    asr_base: Rate = Field(description="The same of the base model after the same attack.")
    asr_never_knew: Rate | None = Field(
        default=None, description="The same of the model that never knew. Null without it."
    )
    recovered: Recovery
    curve: str = Field(default="", description="Name of the curve that the result belongs to. Empty without a curve.")
    step: float | None = Field(default=None, description="Position on the curve, such as the number of steps.")
    is_score: bool = Field(default=False, description="Whether the rates are mean scores of a probe.")
    facts: dict[str, float] = Field(
        default_factory=dict, description="Further numbers of the attacked model, such as `loss`."
    )


class StepsToHalf(Record):
    """The steps after which a relearning curve reaches half of the base model's rate without an attack."""

    curve: str = Field(description="Name of the curve.")
    threshold: float = Field(description="Half of the base model's ASR without an attack.")
    model: float | None = Field(description="The first measured step at or above it. Null if no step reaches it.")
    base: float | None = Field(default=None, description="The same of the base model.")
    never_knew: float | None = Field(default=None, description="The same of the model that never knew.")


class SkippedAttack(Record):
    """An attack that does not work with the model's family."""

    attack: str = Field(description="The attack with its options.")
    reason: str = Field(description="Why it was not run.")


class RobustnessReport(Record):
    """``robustness.json``: what each attack brings back."""

    schema_version: Literal[1] = Field(default=1, alias="schema")
    model: str = Field(description="Name of the model.")
    base: str = Field(description="The base model.")
    never_knew: str | None = Field(default=None, description="The model that never knew, if there is one.")
    judge: str = Field(default="", description="The judge of the answers. Empty in files of earlier versions.")
    budget: Literal["small", "full"]
    num_questions: Count
    attacks: list[AttackResult]
    skipped: list[SkippedAttack] = Field(
        default_factory=list, description="The attacks that do not work with the model's family."
    )
    steps_to_half: list[StepsToHalf] = Field(default_factory=list)

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, serialize_by_alias=True)
