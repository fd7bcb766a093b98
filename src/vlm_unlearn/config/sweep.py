"""Sweeps: a recipe, a space of settings to try, a suite, and the objectives that compare the trained models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from vlm_unlearn.config.base import Positive, Strict
from vlm_unlearn.config.loader import apply_overrides, parse_exponent
from vlm_unlearn.config.recipe import Bound
from vlm_unlearn.config.robustness import Budget
from vlm_unlearn.errors import UserError

Direction = Literal["min", "max"]
Sampler = Literal["tpe", "nsga2", "random", "grid"]
MAX_SEEDS = 1000


class ParameterConfig(Strict):
    """The values of one setting: a list of choices, or a range from `low` to `high`."""

    choices: list[Any] | None = None
    """The values to choose from. A list in place of the mapping is a short form."""
    low: int | float | None = None
    """The smallest value of a range. The values are integers if `low`, `high` and `step` are."""
    high: int | float | None = None
    """The largest value of a range."""
    log: bool = False
    """Whether the values of the range are spread evenly on a logarithmic scale."""
    step: int | float | None = None
    """Distance of two values of the range. `grid` needs it for a range of fractions."""
    when: dict[str, Any] = {}
    """Conditions on keys of the recipe, such as `{method: [npo, simnpo]}`. Otherwise the setting is left out.

    They can also name other keys of the space, which come before this one.
    """

    @field_validator("choices", mode="before")
    @classmethod
    def _parse_choices(cls, value: Any) -> Any:
        return [parse_exponent(item) for item in value] if isinstance(value, list) else value

    @field_validator("low", "high", "step", mode="before")
    @classmethod
    def _parse_number(cls, value: Any) -> Any:
        return parse_exponent(value)

    @model_validator(mode="after")
    def _check_values(self) -> ParameterConfig:
        if self.choices is not None:
            if self.low is not None or self.high is not None or self.log or self.step is not None:
                raise UserError("needs either `choices` or a range", code="conflicting-settings")
            if not self.choices:
                raise UserError("the list of choices is empty", code="missing-setting")
            return self
        if self.low is None or self.high is None:
            raise UserError("needs a list of choices, or `low` and `high`", code="missing-setting")
        if self.low > self.high:
            raise UserError("`low` is greater than `high`", code="out-of-range")
        if self.log and self.low <= 0:
            raise UserError("`log` needs a `low` above 0", code="out-of-range")
        if self.log and self.step is not None:
            raise UserError("`log` and `step` exclude each other", code="conflicting-settings")
        if self.step is not None and self.step <= 0:
            raise UserError("`step` must be above 0", code="out-of-range")
        return self

    @property
    def is_integer(self) -> bool:
        """Whether a range consists of integers."""
        return all(isinstance(value, int) for value in (self.low, self.high, self.step) if value is not None)


class SweepRobustnessConfig(Strict):
    """Attacks on each trained model. They add the metrics `worst_recovery` and `recovery:<attack>`."""

    suite: Path
    """A robustness suite, or the name of a shipped one."""
    suite_overrides: dict[str, Any] = {}
    """Keys of the robustness suite, such as `{root: SafeEraser}`."""
    budget: Budget = "small"
    """Which attacks of the suite to run."""
    base: str | None = None
    """The model before unlearning. Null takes the model of the recipe."""
    never_knew: str | None = None
    """A model trained like the base without the harmful knowledge."""

    @field_validator("suite_overrides", mode="before")
    @classmethod
    def _read_overrides(cls, value: Any) -> Any:
        return nested_overrides(value)


class Sweep(Strict):
    """Many training runs: a recipe with settings to vary, a suite, and objectives."""

    name: str = ""
    """Name of the study. The default is the name of the output folder."""
    recipe: str
    """A recipe file, or the name of a shipped one. The key `recipe` of the space varies it."""
    overrides: dict[str, Any] = {}
    """Keys of the recipe for all trials, nested or dotted, or a list of texts such as `training.max_steps=60`."""
    suite: Path
    """A suite file, or the name of a shipped one. It measures each trained model."""
    suite_overrides: dict[str, Any] = {}
    """Keys of the suite, such as `{root: VLGuard}`."""
    sampler: Sampler = "tpe"
    """`tpe` and `nsga2` learn from earlier trials, `random` draws each trial, and `grid` tries all combinations."""
    sampler_seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the sampler."""
    space: dict[str, ParameterConfig]
    """The settings to vary, by dotted keys of the recipe, in the order of their conditions."""
    objectives: dict[str, Direction]
    """`min` or `max` for each metric of the suite that the trials are compared by."""
    constraints: dict[str, Bound] = {}
    """Bounds on metrics, such as `{degenerate_rate: {at_most: 0.1}}`. A trial outside of them is not on the front."""
    trials: Positive | None = None
    """Number of trials. `grid` needs none."""
    seeds: list[Annotated[int, Field(ge=0, lt=2**32)]] = []
    """Training seeds. Each trial trains once with each, and its values are means. Empty keeps the recipe's seed."""
    select_on: Literal["half", "all"] = "half"
    """`half` compares trials by one half of the questions and reports the rates on the other. `all` uses all for both.
    """
    half_seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the halves."""
    prune: bool = False
    """Stop a trial early if the probe of its recipe rates it below the median. Needs a single objective."""
    keep_models: Literal["front", "all", "none"] = "front"
    """Which trained models stay on disk. `front` deletes the model of a trial as soon as another is better."""
    retries: Annotated[int, Field(ge=0, le=100)] = 1
    """How often a trial is tried again if its worker was killed."""
    stale_after: Annotated[float, Field(ge=1, le=86_400)] = 120.0
    """Seconds without a sign of life after which a worker counts as killed. On the same machine it is noticed at once.
    """
    robustness: SweepRobustnessConfig | None = None
    """Attacks on each trained model, for objectives such as `worst_recovery`."""

    @field_validator("overrides", "suite_overrides", mode="before")
    @classmethod
    def _read_overrides(cls, value: Any) -> Any:
        return nested_overrides(value)

    @field_validator("space", mode="before")
    @classmethod
    def _expand_choices(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {key: {"choices": item} if isinstance(item, list) else item for key, item in value.items()}

    @field_validator("seeds", mode="before")
    @classmethod
    def _expand_count(cls, value: Any) -> Any:
        is_count = isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MAX_SEEDS
        return list(range(value)) if is_count else value

    @model_validator(mode="after")
    def _check_settings(self) -> Sweep:
        if not self.space:
            raise UserError("the space is empty. Name at least one key of the recipe.", code="missing-setting")
        if not self.objectives:
            raise UserError("name at least one objective, such as {asr_attacked: min}", code="missing-setting")
        if self.sampler != "grid" and self.trials is None:
            raise UserError(f"the sampler {self.sampler} needs the number of `trials`", code="missing-setting")
        if len(set(self.seeds)) < len(self.seeds):
            raise UserError("two seeds are equal", code="duplicate-id")
        if self.seeds and "training.seed" in self.space:
            raise UserError(
                "`seeds` and the key training.seed of the space exclude each other", code="conflicting-settings"
            )
        if self.prune and len(self.objectives) > 1:
            raise UserError("`prune` needs a single objective", code="conflicting-settings")
        if self.prune and len(self.seeds) > 1:
            raise UserError("`prune` needs a single seed", code="conflicting-settings")
        for key in ("output", "name"):
            if key in self.space or key in self.overrides:
                raise UserError(f"the sweep sets the key {key} of its recipes itself", code="conflicting-settings")
        return self


def nested_overrides(value: Any) -> Any:
    """Returns overrides as a nested mapping. They can be a list of ``key=value``, and keys can be dotted.

    Raises:
        UserError: An item of a list is not ``key=value``.
    """
    if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        return apply_overrides({}, list(value))
    if not isinstance(value, dict):
        return value
    nested: dict[str, Any] = {}
    for key, item in value.items():
        *parents, last = str(key).split(".")
        target = nested
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise UserError(f"{key} has both a value and keys below it", code="conflicting-settings")
        if isinstance(item, dict) and isinstance(target.get(last), dict):
            target[last] = {**target[last], **item}
        else:
            target[last] = item
    return nested


def parse_seeds(text: str) -> list[int]:
    """Returns the seeds of an option such as ``0,1,2``.

    Raises:
        UserError: The text is not a list of different numbers.
    """
    items: Sequence[str] = [item.strip() for item in text.split(",")]
    valid = all(item.isdecimal() and len(item) <= 10 and int(item) < 2**32 for item in items)
    if not valid or len({int(item) for item in items}) < len(items) or len(items) > MAX_SEEDS:
        raise UserError(
            "must be different numbers with commas between them, such as 0,1,2.", code="invalid-value", field="--seeds"
        )
    return [int(item) for item in items]
