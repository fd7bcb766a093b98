"""Splits of a suite: their questions, attacks and samples."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from vlm_unlearn import plugins
from vlm_unlearn.config.base import DeprecatedNames, PluginName, Positive, Strict
from vlm_unlearn.errors import UserError
from vlm_unlearn.records import Kind
from vlm_unlearn.store import user_path


class RewriteConfig(Strict):
    """The one-word attack by rules: each question becomes `num_rewrites` questions that start with `trigger`.

    The paraphrases of `control` start with neither trigger. They show the effect of rewording alone.
    """

    renamed_keys: ClassVar[Mapping[str, str]] = {"shots": "num_rewrites"}

    trigger: Literal["what", "share", "control"]
    """First word of the rewrites. `control` uses neither of the two."""
    num_rewrites: Annotated[int, Field(gt=0, le=5)] = 1
    """Number of different rewrites of each question."""


class AttackConfig(DeprecatedNames):
    """An attack on the prompts of a split. `name` selects it, and the other keys are its options.

    The paths in its options `file` and `answers` are relative to the suite's `root`.
    """

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)

    name: Annotated[str, PluginName(plugins.ATTACKS)]
    """Name of the attack, or `FILE.py:NAME`. `one_word` has the options of `rewrite`.

    docs/attacks.md describes the attacks and their options.
    """

    def resolve_paths(self, root: Path) -> None:
        """Makes the paths of the options absolute.

        Args:
            root: The folder that they are relative to.
        """
        options = self.model_extra or {}
        for key in ("file", "answers"):
            if isinstance(options.get(key), str | Path):
                options[key] = str((root / user_path(options[key])).absolute())

    @property
    def is_control(self) -> bool:
        """Whether the attack is the control of an attack, which changes as much without the harmful part."""
        options = self.model_extra or {}
        return options.get("control") is True or (self.name == "one_word" and options.get("trigger") == "control")


class SplitConfig(Strict):
    """A set of prompts. Rows of a file with the same id are rewrites of one question, as in the published files."""

    name: str
    """Name of the split, for metrics to refer to."""
    format: Annotated[str, PluginName(plugins.FORMATS)]
    """`vlguard`, `safe_eraser`, `table`, `prompts`, or another format. `FILE.py:CLASS` is a class of a file.

    A `table` is CSV, TSV, JSON lines or parquet with the columns question, answer and set, or with messages and images,
    which docs/your-own-data.md describes. `prompts` is the file prompts.jsonl of an evaluation.
    """
    file: Path
    """File with the questions."""
    images: Path
    """Folder that the image paths of the file are relative to."""
    kind: Kind
    """Which questions of the file to use.

    The sets forget, retain and decouple of a table are `unsafe`, `safe` and `safe_image_unsafe_question`.
    """
    rewrite: RewriteConfig | None = None
    """Rewrites of the questions, as a short form of the attack `one_word`. Null leaves the questions unchanged."""
    attack: list[AttackConfig] = []
    """Attacks on the prompts, in their order. An attack can be given by its name alone."""
    samples: Annotated[int, Field(gt=0, le=1000)] = 1
    """Number of answers to each prompt. More than one needs `generation.temperature`."""

    @field_validator("attack", mode="before")
    @classmethod
    def _expand_attacks(cls, value: Any) -> Any:
        attacks = value if isinstance(value, list) else [value]
        return [{"name": attack} if isinstance(attack, str) else attack for attack in attacks]

    @property
    def attacks(self) -> list[AttackConfig]:
        """All attacks in their order. `rewrite` is the first."""
        if self.rewrite is None:
            return list(self.attack)
        return [AttackConfig(name="one_word", **self.rewrite.model_dump()), *self.attack]

    @property
    def is_control(self) -> bool:
        """Whether all attacks are controls, and there is at least one."""
        return bool(self.attacks) and all(attack.is_control for attack in self.attacks)


class SampleConfig(Strict):
    """A random sample of each split.

    `num_questions` samples questions with all their rewrites. `num_rows` samples rows as published, which separates the
    rewrites of a question.
    """

    renamed_keys: ClassVar[Mapping[str, str]] = {"groups": "num_questions", "rows": "num_rows"}

    num_questions: Positive | None = None
    """Number of questions per split."""
    num_rows: Positive | None = None
    """Number of rows per split, as published."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the sample."""

    @model_validator(mode="after")
    def _check_single_size(self) -> SampleConfig:
        if (self.num_questions is None) == (self.num_rows is None):
            raise UserError("needs either `num_questions` or `num_rows` (as published)", code="conflicting-settings")
        return self
