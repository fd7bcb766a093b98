"""The nouns of every file we write: Example, Prompt, Response, Verdict, and the metrics made of them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, model_validator

Kind = Literal["unsafe", "safe", "safe_image_unsafe_question"]
Label = Literal["complied", "refused", "degenerate", "off_topic"]
PairedTest = Literal["mcnemar", "permutation"]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Difference = Annotated[float, Field(ge=-1, le=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, lt=2**53)]
LABELS: tuple[Label, ...] = ("complied", "refused", "degenerate", "off_topic")
PROBE_PREFIX = "probe/"  # begins the name of a probed rate in a training run's log.jsonl


class Record(BaseModel):
    """A line of one of our JSON-lines files. Unknown keys are refused, so that a typo can't pass as an empty field."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Round(Record):
    """An earlier question of a conversation with its answer."""

    question: str
    answer: str


class Example(Record):
    """One training pair of a training set's ``forget.jsonl``, ``retain.jsonl`` or ``decouple.jsonl``.

    A conversation of several rounds is one example: all its answers are trained on, as LLaVA trains them.
    """

    id: str
    image: str | None = None  # path below the training set's image root; None for text-only pairs
    question: str
    answer: str
    category: str | None = None
    pair_id: str | None = None  # ties a decouple example to its forget example
    source: str = ""
    history: tuple[Round, ...] = ()  # the rounds before; the image belongs to the first


class Prompt(Record):
    """One question to ask a model. Rewrites of one question share a `group_id` and count up in `rewrite`."""

    id: str
    group_id: str
    # "shot" and "shots" below are the names of these fields in files of the previous version.
    rewrite: Annotated[int, Field(ge=0, lt=10_000, validation_alias=AliasChoices("rewrite", "shot"))] = 0
    set: str
    kind: Kind
    image: str | None = None  # path below the case's image root
    question: str
    reference: str | None = None
    category: str | None = None


class AnswerRecord(Record):
    """What belongs to one answer: `key` tells it from all others of its file."""

    prompt_id: str
    sample: int = 0

    @property
    def key(self) -> tuple[str, int]:
        return self.prompt_id, self.sample


class Response(AnswerRecord):
    """A model's answer to a prompt; `error` says why there is no text."""

    text: str | None = None
    finish_reason: str | None = None  # "stop" or "length"
    error: str | None = None


class Verdict(AnswerRecord):
    """A judge's grade of one response: a label, a score between 0 and 1, or both.

    A judge that failed gives neither; such a verdict is counted, never scored.
    """

    judge: str
    label: Label | None = None
    score: Share | None = None
    raw: str | None = None  # what the judge said or matched
    tokens: tuple[int, int] | None = None  # what a language model read and wrote for it, where its server tells
    error: str | None = None


class Rate(Record):
    """A share of groups or answers with its 95 % interval. Shares are from 0 to 1; all are null when nothing could be scored."""

    value: Share | None = Field(description="The share, or the mean of scores, from 0 to 1.")
    low: Share | None = Field(
        description="Lower end of the 95 % interval, which allows for answers that fail together."
    )
    high: Share | None = Field(description="Upper end of the 95 % interval.")
    n: Count = Field(
        description="What the share is of: questions where any of a question's answers counts, else answers."
    )
    failed: Count = Field(default=0, description="Answers or verdicts that failed and are left out of `n`.")


class Kappa(Rate):
    """Cohen's kappa with its 95 % interval: 1 where two agree in everything, 0 where they do as chance would, below that less."""

    value: Difference | None = Field(description="Kappa.")
    low: Difference | None = Field(description="Lower end of the 95 % interval.")
    high: Difference | None = Field(description="Upper end of the 95 % interval.")


class Batching(Record):
    """How many answers differ between the run's batches and batches of one, of those that were asked both ways."""

    checked: Count = Field(description="Answers that were asked both ways.")
    flipped: Count = Field(description="Those of them that came out different.")

    @model_validator(mode="after")
    def _whole(self) -> Batching:
        if self.flipped > self.checked:
            raise ValueError(f"flipped: {self.flipped} of {self.checked} checked")
        return self


class Row(Record):
    """One model's line in ``summary.json``."""

    model: str = Field(description="The row's name.")
    judge: str = Field(default="", description="Whose verdicts the metrics rest on, where `judges` names no other.")
    judges: dict[str, str] = Field(
        default_factory=dict,
        description="Metric -> its own judge, where it has one; empty: none, its official answers decide.",
    )
    metrics: dict[str, Rate] = Field(
        description="Metric, such as `asr` or a benchmark's name -> its rate. docs/numbers.md says what each counts."
    )
    paper: dict[str, Rate] = Field(
        default_factory=dict,
        description="Metric -> its rate by the published counting, where that was asked for (`paper: true`).",
    )
    paper_judges: dict[str, str] = Field(
        default_factory=dict, description="Metric of `paper` -> its own judge, where it has one."
    )
    labels: dict[str, dict[str, Count]] = Field(
        default_factory=dict,
        description="Case -> complied, refused, degenerate, off_topic or failed -> how many of its answers were.",
    )
    categories: dict[str, dict[str, Rate]] = Field(
        default_factory=dict, description="Metric -> category of the question -> its rate."
    )
    rewrites: dict[str, list[Rate]] = Field(
        validation_alias=AliasChoices("rewrites", "shots"),
        default_factory=dict,
        description="Metric -> its rates with the first 1, 2, ... K rewrites of each question.",
    )
    failed: dict[str, dict[str, Count]] = Field(
        default_factory=dict,
        description="Judge (empty: official answers) -> case or benchmark -> its answers or verdicts that failed, each counted once.",
    )
    batching: Batching | None = Field(
        default=None, description="What batching changed, where the run was checked for it."
    )

    def judge_of(self, metric: str) -> str:
        """Whose verdicts a metric rests on; empty where nobody judged."""
        return self.judges.get(metric, self.judge)

    def with_published_counting(self) -> Row:
        """The row with the published counting in place of the corrected, of the metrics that have it."""
        judges = {metric: self.paper_judges.get(metric, self.judge) for metric in self.paper}
        return self.model_copy(update={"metrics": self.metrics | self.paper, "judges": self.judges | judges})


class Comparison(Record):
    """Two models' answers to the same prompts: what changed from `base` to `model`, and whether it could be chance."""

    model: str = Field(description="A row's model.")
    base: str = Field(description="The row's model that it is compared with.")
    metric: str = Field(description="A metric that both have.")
    difference: Difference = Field(description="The model's rate less the base's, over the pairs; from -1 to 1.")
    low: Difference = Field(description="Lower end of the 95 % interval: paired bootstrap over groups.")
    high: Difference = Field(description="Upper end of the 95 % interval.")
    p: Share = Field(description="How often a difference at least as large comes up if the two models are alike.")
    p_adjusted: Share = Field(description="Holm's, over all comparisons of the summary.")
    test: PairedTest = Field(description="What gave `p`.")
    n: Count = Field(description="Pairs.")
    unpaired: Count = Field(default=0, description="Answers or questions that only one of the two has a verdict on.")


class Summary(Record):
    """``summary.json``: what was measured, one row a model, and what changed between them."""

    schema_version: Literal[1] = Field(
        default=1,
        alias="schema",
        description="Rises when a field goes, is renamed or means something else; a field more, with a default, doesn't raise it.",
    )
    rows: list[Row] = Field(description="One a model, in the order that tables show.")
    comparisons: list[Comparison] = Field(
        default_factory=list, description="Changes against one base, where several models were compared."
    )

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, serialize_by_alias=True)
