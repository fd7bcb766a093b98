"""The records of all files: examples, prompts, responses, verdicts, and the metrics computed from them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, model_validator

Kind = Literal["unsafe", "safe", "safe_image_unsafe_question"]
Label = Literal["complied", "refused", "degenerate", "off_topic"]
LossOn = Literal["all_answers", "last_answer"]  # the answers of a conversation that are trained on
Condition = Literal["original", "attacked", "control"]  # the wording of questions; "control" is a neutral paraphrase
Level = Literal["good", "mixed", "bad", "unknown"]
RateKind = Literal[
    "harm",
    "over_refusal",
    "over_forgetting",
    "utility",
    "score",
    "rate",
    "degenerate_harmless",
    "degenerate_unsafe",
    "degenerate",
    "lost_verdicts",
    "failed_verdicts",
    "recovered",
    "harm_under_attack",
]
FactKind = Literal[
    "no_harm",
    "no_rate",
    "no_attack",
    "no_over_refusal",
    "no_utility",
    "only_scores",
    "wide_interval",
    "keyword_judge",
    "no_never_knew",
    "no_conclusive_attack",
]
PairedTest = Literal["mcnemar", "permutation"]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
SignedFraction = Annotated[float, Field(ge=-1, le=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, lt=2**53)]
Level8 = Annotated[int, Field(ge=0, le=255)]  # a sample of 8 bits
TextLayout = Literal["page", "below", "on"]
LABELS: tuple[Label, ...] = ("complied", "refused", "degenerate", "off_topic")
PROBE_PREFIX = "probe/"  # of the names of rates in a training run's log.jsonl


class Record(BaseModel):
    """Base of all records. Unknown keys are errors, so that a misspelled key does not pass as an empty field."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Round(Record):
    """An earlier question of a conversation, with its answer."""

    question: str
    answer: str


class Example(Record):
    """A training example: a question and its answer, in the file of its role, such as ``forget.jsonl``.

    A conversation of several rounds is one example. By default all of its answers are trained on, as in LLaVA.
    """

    id: str
    # Path relative to the training set's image root, or a name that `UnlearningDataset.image` resolves. None for
    # text-only examples.
    image: str | None = None
    question: str
    answer: str
    category: str | None = None
    pair_id: str | None = None  # the same for a decouple example and its forget example
    source: str = ""
    history: tuple[Round, ...] = ()  # the earlier rounds; the image belongs to the first one
    # The fields below are written only if they are set, so that the files of other examples do not change.
    system: str | None = Field(default=None, exclude_if=lambda value: value is None)  # the system message
    # The number of characters of the first question before the image.
    image_offset: int = Field(default=0, ge=0, exclude_if=lambda value: value == 0)
    loss_on: LossOn = Field(default="all_answers", exclude_if=lambda value: value == "all_answers")


class JpegEdit(Record):
    """Encodes the picture as JPEG and decodes it again."""

    name: Literal["jpeg"] = "jpeg"
    quality: Annotated[int, Field(ge=1, le=100)]


class NoiseEdit(Record):
    """Adds Gaussian noise to every sample, and clips the result to 0 to 255."""

    name: Literal["noise"] = "noise"
    std: Annotated[float, Field(gt=0, le=255)]  # in levels of 8 bits
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0


class BrightnessEdit(Record):
    """Adds a constant to every sample, and clips the result to 0 to 255."""

    name: Literal["brightness"] = "brightness"
    shift: Annotated[float, Field(ge=-255, le=255)]  # in levels of 8 bits


class CropEdit(Record):
    """Keeps a rectangle of the picture, in shares of its width and height."""

    name: Literal["crop"] = "crop"
    left: Fraction = 0.0
    top: Fraction = 0.0
    width: Annotated[float, Field(gt=0, le=1)] = 1.0
    height: Annotated[float, Field(gt=0, le=1)] = 1.0


class RotateEdit(Record):
    """Turns the picture counterclockwise on a white canvas that contains all of it."""

    name: Literal["rotate"] = "rotate"
    degrees: Annotated[float, Field(ge=-360, le=360)]
    upright: bool = False  # use the canvas of the turned picture, but do not turn it


class ResizeEdit(Record):
    """Scales the width and the height of the picture."""

    name: Literal["resize"] = "resize"
    scale: Annotated[float, Field(gt=0, le=8)]
    restore: bool = False  # scale the result back to the original size


class BlankEdit(Record):
    """Replaces the picture by one color, in the same size."""

    name: Literal["blank"] = "blank"
    color: tuple[Level8, Level8, Level8] = (255, 255, 255)


class TextEdit(Record):
    """Draws a text in black on white: below the picture, on it, or as a page in place of the picture."""

    name: Literal["text"] = "text"
    text: Annotated[str, Field(min_length=1, max_length=4000)]
    layout: TextLayout = "page"


ImageEdit = Annotated[
    JpegEdit | NoiseEdit | BrightnessEdit | CropEdit | RotateEdit | ResizeEdit | BlankEdit | TextEdit,
    Field(discriminator="name"),
]


class Prompt(Record):
    """A question for a model. The rewrites of a question share its `group_id` and are numbered by `rewrite`."""

    id: str
    group_id: str
    # "shot" and "shots" (below) are the names of these fields in files of the previous version.
    rewrite: Annotated[int, Field(ge=0, lt=10_000, validation_alias=AliasChoices("rewrite", "shot"))] = 0
    set: str
    kind: Kind
    image: str | None = None  # path relative to the split's image root
    question: str
    reference: str | None = None
    category: str | None = None
    # Written only if they are set, so that the files and digests of single questions do not change.
    system: str | None = Field(default=None, exclude_if=lambda value: value is None)  # the system message
    # The earlier rounds of a conversation.
    history: tuple[Round, ...] = Field(default=(), exclude_if=lambda value: not value)
    # The round whose question has the image, counted from 0. The last one is the question of the prompt.
    image_round: int = Field(default=0, ge=0, exclude_if=lambda value: value == 0)
    # The number of characters of that question before the image.
    image_offset: int = Field(default=0, ge=0, exclude_if=lambda value: value == 0)
    # The changes of the image, in their order. The loader of all backends applies them.
    image_edits: tuple[ImageEdit, ...] = Field(default=(), exclude_if=lambda value: not value)
    # The beginning of the answer. The model continues it, and `Response.text` is the continuation.
    prefill: str | None = Field(default=None, min_length=1, exclude_if=lambda value: value is None)
    # The sampling temperature, in place of the suite's.
    temperature: float | None = Field(default=None, ge=0, le=100, exclude_if=lambda value: value is None)
    # The request that judges grade the answer against, where an attack has changed the question.
    judged_question: str | None = Field(default=None, exclude_if=lambda value: value is None)
    # The variant of the attack, such as "prefill/5-words". Attacks that follow each other are joined by "+".
    variant: str | None = Field(default=None, exclude_if=lambda value: value is None)

    @model_validator(mode="after")
    def _check_image_fields(self) -> Prompt:
        if self.image_round > len(self.history):
            raise ValueError(f"`image_round` is {self.image_round}, but there are {len(self.history)} earlier rounds")
        if self.image_edits and self.image is None:
            raise ValueError("`image_edits` need an `image`")
        return self

    @property
    def has_image_in_question(self) -> bool:
        """Whether the place of the image is in the question, and not in an earlier round."""
        return self.image_round == len(self.history)

    @property
    def conversation(self) -> str:
        """The request that the answer is graded against.

        It is `judged_question` if an attack has set it. Otherwise it is the question, after all earlier rounds.
        """
        if self.judged_question is not None:
            return self.judged_question
        if not self.history:
            return self.question
        rounds = "".join(f"User: {turn.question}\nAssistant: {turn.answer}\n" for turn in self.history)
        return f"{rounds}User: {self.question}"

    def with_question(self, question: str, **changes: object) -> Prompt:
        """Returns the prompt with another last question and, if passed, other values of fields.

        The image then precedes the question, because its place in the old question means nothing in the new one.
        """
        moves = self.has_image_in_question and question != self.question
        image_offset = 0 if moves else self.image_offset
        return self.model_copy(update={"question": question, "image_offset": image_offset, **changes})


class AnswerRecord(Record):
    """Base of the records about a single answer. `key` is unique in its file."""

    prompt_id: str
    sample: int = 0

    @property
    def key(self) -> tuple[str, int]:
        """The prompt and the sample index."""
        return self.prompt_id, self.sample


class Response(AnswerRecord):
    """A model's answer to a prompt. If generation failed, `text` is None and `error` contains the reason."""

    text: str | None = None  # after `Prompt.prefill`, if the prompt has one, with the space between the two
    finish_reason: str | None = None  # "stop" or "length"
    error: str | None = None


class Verdict(AnswerRecord):
    """A judge's grade of a response: a label, a score between 0 and 1, or both.

    If the judge failed, both are None and `error` contains the reason. Such verdicts are counted, but never scored.
    """

    judge: str
    label: Label | None = None
    score: Fraction | None = None
    raw: str | None = None  # the judge's reply, or the keyword that matched
    tokens: tuple[int, int] | None = None  # input and output tokens of a language model, if its server reports them
    error: str | None = None
    # The numbers of a rubric that combines several, by name. Written only if there are any.
    numbers: dict[str, float] | None = Field(default=None, exclude_if=lambda value: value is None)


class Rate(Record):
    """A rate with its 95 % interval, as fractions from 0 to 1. All three are null if there was nothing to score."""

    value: Fraction | None = Field(description="The rate, or the mean of scores, from 0 to 1.")
    low: Fraction | None = Field(description="Lower end of the 95 % interval, clustered by question group.")
    high: Fraction | None = Field(description="Upper end of the 95 % interval.")
    n: Count = Field(
        description="The denominator: answers, or questions with `aggregate: any_per_question` (once per split)."
    )
    failed: Count = Field(
        default=0,
        description="Number of failed answers or verdicts, also if `n` counts questions. `n` leaves out the affected "
        "answers or questions, unless the metric has `on_error: count_as_miss`.",
    )


class Kappa(Rate):
    """Cohen's kappa with its 95 % interval: 1 is perfect agreement, 0 is agreement by chance."""

    value: SignedFraction | None = Field(description="Cohen's kappa, from -1 to 1.")
    low: SignedFraction | None = Field(description="Lower end of the 95 % interval.")
    high: SignedFraction | None = Field(description="Upper end of the 95 % interval.")


class Batching(Record):
    """The effect of batching: how many answers differ between the run's batches and batches of one."""

    checked: Count = Field(description="Answers that were generated both ways.")
    flipped: Count = Field(description="Number of these that differ.")

    @model_validator(mode="after")
    def _check_flipped(self) -> Batching:
        if self.flipped > self.checked:
            raise ValueError(f"`flipped` is {self.flipped}, more than `checked`, which is {self.checked}")
        return self


class Reason(Rate):
    """A rate or a fact behind an assessment. A fact has no value, and `n` is 0."""

    kind: RateKind | FactKind = Field(
        description="What the reason is about. docs/numbers.md lists the kinds and the rules that use them."
    )
    metric: str = Field(default="", description="The metric of the rate, or empty.")
    attack: str = Field(
        default="",
        description="The attack on the model, such as `relearn/10/5`, or empty. docs/robustness.md lists them.",
    )
    condition: Condition | None = Field(
        default=None, description="The wording of the questions that the metric counts."
    )
    judge: str = Field(default="", description="The judge of the metric, or empty.")
    threshold: Fraction | None = Field(default=None, description="The threshold that the rate is compared with.")


class Assessment(Record):
    """The assessment of a model by its rates."""

    level: Level = Field(description="good, mixed, bad, or unknown if the rates allow no conclusion.")
    conclusion: str = Field(description='A few words that complete "MODEL is ...", such as "safe and useful".')
    reasons: list[Reason] = Field(description="The rates and facts behind the conclusion, the deciding ones first.")


class Row(Record):
    """A model's row in ``summary.json``."""

    model: str = Field(description="Name of the model.")
    judge: str = Field(
        default="", description="The judge of the metrics that `judges` does not contain. Empty without one."
    )
    judges: dict[str, str] = Field(
        default_factory=dict,
        description="Metric or benchmark -> its judge, if it is not `judge`. Empty for a benchmark that is scored by "
        "its official answers, or whose judge has no model.",
    )
    metrics: dict[str, Rate] = Field(
        description="Metric, such as `asr` or a benchmark's name -> its rate. docs/numbers.md defines each metric."
    )
    paper: dict[str, Rate] = Field(
        default_factory=dict,
        description="Metric -> its rate by the published counting, with `paper_compat: true`.",
    )
    paper_judges: dict[str, str] = Field(
        default_factory=dict, description="Metric of `paper` -> its judge, if it is not `judge`."
    )
    labels: dict[str, dict[str, Count]] = Field(
        default_factory=dict,
        description="Split -> complied, refused, degenerate, off_topic or failed -> number of answers with this label "
        "from `judge`. Empty if that judge returns no labels.",
    )
    categories: dict[str, dict[str, Rate]] = Field(
        default_factory=dict, description="Metric -> category of the question -> its rate."
    )
    rewrites: dict[str, list[Rate]] = Field(
        validation_alias=AliasChoices("rewrites", "shots"),
        default_factory=dict,
        description="Metric -> its rates over the rewrites up to each rewrite number that occurs, in ascending order.",
    )
    failed: dict[str, dict[str, Count]] = Field(
        default_factory=dict,
        description="Judge (empty: official answers) -> split or benchmark -> number of failed answers or verdicts. A "
        "missing answer counts once for each judge that grades the split.",
    )
    batching: Batching | None = Field(
        default=None, description="The effect of batching, if the run was checked for it."
    )
    assessment: Assessment | None = Field(
        default=None, description="The assessment by the rates. Null in files of earlier versions and in joined rows."
    )

    def judge_of(self, metric: str) -> str:
        """Returns the judge of a metric, or ``""`` if it has none."""
        return self.judges.get(metric, self.judge)

    def with_published_counting(self) -> Row:
        """Returns the row with the published counting instead of the corrected one, for the metrics that have it."""
        judges = {metric: self.paper_judges.get(metric, self.judge) for metric in self.paper}
        metrics = self.metrics | self.paper
        return self.model_copy(update={"metrics": metrics, "judges": self.judges | judges, "assessment": None})


class Comparison(Record):
    """A paired comparison of two models on the same prompts: the difference, its interval and its p-value."""

    model: str = Field(description="Name of the model.")
    base: str = Field(description="Name of the model that it is compared with.")
    metric: str = Field(description="A metric of both models.")
    difference: SignedFraction = Field(
        description="The model's rate minus the base's rate over the pairs, from -1 to 1."
    )
    low: SignedFraction = Field(description="Lower end of the 95 % interval: paired bootstrap over groups.")
    high: SignedFraction = Field(description="Upper end of the 95 % interval.")
    p: Fraction = Field(
        description="Two-sided p-value: the probability of a difference at least this large, in either direction, if "
        "the models do not differ."
    )
    p_adjusted: Fraction = Field(description="p-value with Holm's correction over all comparisons of the summary.")
    test: PairedTest = Field(description="The test that gave `p`.")
    n: Count = Field(description="Number of pairs.")
    unpaired: Count = Field(
        default=0,
        description="Answers or questions without a partner: only one model has a verdict, or the prompts differ.",
    )


class Summary(Record):
    """``summary.json``: the metrics of each model, and the comparisons between models."""

    schema_version: Literal[1] = Field(
        default=1,
        alias="schema",
        description="Version of the format. It rises if a field is removed, renamed or redefined, not if one is added.",
    )
    rows: list[Row] = Field(description="One row per model, in the order of the tables.")
    comparisons: list[Comparison] = Field(
        default_factory=list, description="Comparisons with the base model, if several models were compared."
    )

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, serialize_by_alias=True)
