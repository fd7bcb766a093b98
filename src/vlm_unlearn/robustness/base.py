"""The interface of attacks on a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from vlm_unlearn import plugins
from vlm_unlearn.attacks.base import Attack, build_attack
from vlm_unlearn.config import AttackConfig, GenerationConfig, ModelAttackConfig, Strict, validate
from vlm_unlearn.data.dataset import UnlearningDataset
from vlm_unlearn.data.images import ImageSource
from vlm_unlearn.generation.base import GenerationRequest, build_requests
from vlm_unlearn.modeling.vlm import VisionLanguageModel
from vlm_unlearn.plugins import Registry
from vlm_unlearn.records import Example, Prompt
from vlm_unlearn.robustness.halves import Halves


@dataclass(frozen=True)
class AttackedState:
    """A state of the model or of the questions under attack, which is measured while `ModelAttack.run` is suspended.

    Attributes:
        name: The name of the state, such as ``relearn/10/5``. It begins with the name of the attack.
        requests: The questions that the model answers, with their images. None asks the questions of the suite.
        group_ids: The `Prompt.group_id` of the questions that count. None counts all of them.
        scores: A score from 0 to 1 for each `Prompt.id`, for attacks that measure without generating. The model then
            answers nothing.
        curve: The name of the curve that the state belongs to, such as ``relearn/10``. Empty if there is no curve.
        step: The position of the state on its curve, such as the number of steps.
        facts: Further numbers, such as the share of changed weights.
    """

    name: str
    requests: Sequence[GenerationRequest] | None = None
    group_ids: frozenset[str] | None = None
    scores: Mapping[str, float] | None = None
    curve: str = ""
    step: float | None = None
    facts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class AttackTarget:
    """A model under attack, and all that attacks may use.

    Attributes:
        vlm: The model with its processor, on its device and in evaluation mode. Adapters are merged. The weights of an
            attack with `ModelAttack.changes_weights` are not used afterwards.
        base_folder: The folder of the base model, for attacks that put parts of it back.
        load_base: Loads the base model, in the same precision and on the same device.
        questions: The harmful questions of the suite.
        harmless: The harmless questions of the suite. Empty if it has none.
        dataset: The training set, with the roles ``forget`` and ``retain`` and perhaps ``decouple``.
        halves: Divides examples and questions into two halves without common knowledge.
        generation: The generation settings.
        image_roots: The image folder of each split, by `Prompt.set`.
        seed: The seed of random choices.
    """

    vlm: VisionLanguageModel
    base_folder: Path
    load_base: Callable[[], VisionLanguageModel]
    questions: Sequence[GenerationRequest]
    harmless: Sequence[GenerationRequest]
    dataset: UnlearningDataset
    halves: Halves
    generation: GenerationConfig
    image_roots: Mapping[str, Path]
    seed: int

    def examples(self, role: str) -> Sequence[Example]:
        """Returns the examples of a role, or nothing if the training set does not have it."""
        return self.dataset.get(role, ())

    def image(self, example: Example) -> ImageSource | None:
        """Returns the image of an example."""
        return self.dataset.image(example)

    @property
    def prompts(self) -> list[Prompt]:
        """The harmful questions without their images."""
        return [request.prompt for request in self.questions]


class ModelAttack(ABC):
    """Base class of attacks on a model. Subclasses set `options_type` and implement `run`.

    Args:
        options: The options, an object of `options_type`.

    Attributes:
        changes_weights: Whether the attack changes the model. It then gets a model that was loaded for it alone.
        uses_base: Whether the results depend on the base model, too.
    """

    options_type: ClassVar[type[Strict]] = Strict  # no options
    changes_weights: ClassVar[bool] = False
    uses_base: ClassVar[bool] = False

    def __init__(self, options: Any = None) -> None:
        self.options: Any = self.options_type() if options is None else options

    @abstractmethod
    def run(self, target: AttackTarget) -> Iterator[AttackedState]:
        """Attacks the model, and yields every state that is to be measured.

        While the iterator is suspended, the attack must be in effect: weights are changed and hooks installed. An
        attack without `changes_weights` leaves the model as it was when the iterator ends or is closed.
        """


MODEL_ATTACKS: Registry[type[ModelAttack]] = plugins.MODEL_ATTACKS
register = MODEL_ATTACKS.register


class InputAttack(ModelAttack):
    """An attack on the input, such as `prefill`, which changes the questions and leaves the model as it is.

    Args:
        config: The attack. The keys next to ``name`` are its options. ``label`` distinguishes several entries of one
            attack that makes no variants: the state of ``{name: one_word, label: what}`` is ``one_word/what``.

    Raises:
        UserError: There is no such attack, or one of its options is unknown or invalid.
    """

    def __init__(self, config: ModelAttackConfig) -> None:
        super().__init__()
        options = dict(config.model_extra or {})
        label = str(options.pop("label", ""))
        self._state = f"{plugins.short_name(config.name)}/{label}" if label else plugins.short_name(config.name)
        self.attack = build_attack(AttackConfig(name=config.name, **options))

    def run(self, target: AttackTarget) -> Iterator[AttackedState]:
        """Yields one state for each variant of the attack, such as a length of the prefill."""
        roots, loader = target.image_roots, target.generation.image_loader
        variants: dict[str | None, list[Prompt]] = {}
        for prompt in self.attack(target.prompts):
            variants.setdefault(prompt.variant, []).append(prompt)
        for variant, prompts in variants.items():
            name = self._state if variant is None else variant
            yield AttackedState(name, build_requests(prompts, roots, {}, loader))


def build_model_attack(config: ModelAttackConfig) -> ModelAttack:
    """Returns the attack that a config describes. Attacks on the input count too.

    Raises:
        UserError: There is no such attack, one of its options is unknown, or the value of an option is invalid.
    """
    if config.name not in MODEL_ATTACKS and config.name in plugins.ATTACKS:
        return InputAttack(config)
    plugin = MODEL_ATTACKS.load(config.name, "attack.name")
    if isinstance(plugin, type) and issubclass(plugin, Attack):
        return InputAttack(config)
    if not (isinstance(plugin, type) and issubclass(plugin, ModelAttack)):
        expected = "a subclass of ModelAttack or Attack"
        raise plugins.invalid_plugin("model_attack", config.name, plugin, expected, "attack.name")
    return plugin(validate(plugin.options_type, dict(config.model_extra or {}), f"attack {config.name}"))
