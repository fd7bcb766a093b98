"""Robustness suites: the questions, data and attacks with which a model is tested for hidden knowledge."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from vlm_unlearn import plugins
from vlm_unlearn.config.base import DeprecatedNames, PluginName, Positive, Strict
from vlm_unlearn.config.judges import JudgeConfig
from vlm_unlearn.config.splits import SplitConfig
from vlm_unlearn.config.suite import GenerationConfig
from vlm_unlearn.records import Label
from vlm_unlearn.store import user_path

Budget = Literal["small", "full"]


class ModelAttackConfig(DeprecatedNames):
    """An attack of a robustness suite. `name` selects it, and the other keys are its options."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)

    name: Annotated[str, PluginName(plugins.MODEL_ATTACKS)]
    """Name of the attack, or `FILE.py:NAME`."""


class RobustnessSuite(Strict):
    """The attacks on a model, the questions that it answers under attack, and the judge of its answers."""

    root: Path = Path()
    """Folder that the paths of the files below are relative to."""
    data: Path | None = None
    """Training set whose examples the attacks use. Null takes that of the training run."""
    questions: SplitConfig
    """The harmful questions that are asked under every attack."""
    harmless: SplitConfig | None = None
    """Harmless questions, for attacks that compare both kinds."""
    halves: Literal["answer", "image", "category", "id"] = "image"
    """What is kept together if the forget set and the questions are divided into two halves.

    Questions and examples with the same value are in the same half. The value must therefore occur in both.
    """
    judge: JudgeConfig = JudgeConfig(name="keyword")
    """The judge, or only its name."""
    labels: list[Label] = ["complied"]
    """Labels of the judge that count as harmful answers."""
    generation: GenerationConfig = GenerationConfig()
    """Generation of the answers."""
    num_questions: Positive | None = None
    """Number of harmful questions, evenly spaced over the split. Null asks all of them."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the halves and of the attacks."""
    small: list[ModelAttackConfig] = []
    """The attacks of `--budget small`."""
    full: list[ModelAttackConfig] = []
    """The attacks of `--budget full`. Empty takes those of `small`."""

    @field_validator("judge", mode="before")
    @classmethod
    def _expand_judge(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("small", "full", mode="before")
    @classmethod
    def _expand_attacks(cls, value: Any) -> Any:
        attacks = value if isinstance(value, list) else [value]
        return [{"name": attack} if isinstance(attack, str) else attack for attack in attacks]

    @model_validator(mode="after")
    def _resolve_paths(self) -> RobustnessSuite:
        root = user_path(self.root)

        def set_path(config: Strict, field: str) -> None:
            object.__setattr__(config, field, (root / getattr(config, field)).absolute())
            config.model_fields_set.add(field)

        for split in (self.questions, self.harmless):
            if split is not None:
                set_path(split, "file")
                set_path(split, "images")
        if self.judge.world is not None:
            set_path(self.judge, "world")
        if self.data is not None:
            set_path(self, "data")
        object.__setattr__(self, "root", Path())  # the paths are absolute now
        return self

    def attacks(self, budget: Budget) -> list[ModelAttackConfig]:
        """Returns the attacks of a budget, in their order."""
        return list(self.full or self.small) if budget == "full" else list(self.small)
