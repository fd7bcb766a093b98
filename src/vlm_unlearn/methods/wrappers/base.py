"""The interface of defenses against relearning, which change how any method is trained.

A defense works on the gradients of an optimizer step, not on a loss. The trainer splits the gradient of the method's
loss into that of its *forget terms*, which use the roles ``forget`` and ``preferred``, and that of all other terms. A
defense may change the first, perturb the activations under which it is computed, or average the weights. The other
terms always have their gradient at the current weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from vlm_unlearn import plugins
from vlm_unlearn.config import DefenseConfig, Strict, validate
from vlm_unlearn.errors import UserError
from vlm_unlearn.methods.base import Method, Role
from vlm_unlearn.plugins import Registry

FORGET_ROLES: tuple[Role, ...] = ("forget", "preferred")
"""The roles of the forget terms: the answers that are unlearned, and those that are trained in their place."""

Weights = dict[str, Tensor]  # values by the name of a trainable parameter


class ForgetObjective(Protocol):
    """The forget terms of one optimizer step, as a function of the trainable parameters."""

    step: int  # the number of finished optimizer steps, 0 at the first step
    seed: int  # the seed of the run

    def gradient(self, shift: Weights | None = None) -> Weights:
        """Returns the gradient of the forget terms, over all micro-batches and processes of the step.

        Args:
            shift: Added to the weights for the duration of the call, by parameter name. Its tensors are overwritten, so
                that no second copy is needed. None computes the gradient at the current weights.
        """

    def parameters(self) -> Mapping[str, Tensor]:
        """Returns the trainable parameters by name. They must not be changed."""


class LatentObjective(Protocol):
    """The forget terms of one micro-batch, as a function of shifts of the residual stream."""

    def mask(self) -> Tensor:
        """Returns [B, S] bool, True at the positions of questions and images, False at answers and padding."""

    def gradient(self, shifts: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Returns the gradient of the forget terms with respect to the shifts, by layer. The weights get none.

        Args:
            shifts: [B, S, H] by layer, added to the output of decoder layers, 0 the first.
        """

    def zeros(self, layers: Sequence[int]) -> dict[int, Tensor]:
        """Returns zero shifts [B, S, H] of some layers."""


class Defense:
    """Base class of defenses. Subclasses set `options_type` and override some of the methods below.

    Args:
        options: The options, an object of `options_type`.
    """

    name: ClassVar[str] = ""
    source: ClassVar[str] = ""
    """The paper and its arXiv number."""
    options_type: ClassVar[type[Strict]] = Strict  # no options
    weight_copies: ClassVar[int] = 0
    """The number of copies of the trainable parameters that the defense holds at its peak. Frozen ones have none."""

    tiny_options: ClassVar[Mapping[str, Any]] = {}
    """Options that differ from the defaults for a model of two decoder layers, as tests and the demo use."""

    def __init__(self, options: Any = None) -> None:
        self.options: Any = self.options_type() if options is None else options

    def prepare(self, method: Method, layers: int, steps: int) -> None:
        """Prepares the defense for a run. The trainer calls this once before training.

        Args:
            method: The method, prepared for the model.
            layers: The number of decoder layers.
            steps: The number of optimizer steps.

        Raises:
            UserError: An option does not fit the method, the model or the run.
        """

    def forget_gradient(self, objective: ForgetObjective) -> Weights:
        """Returns the gradient of the forget terms with which the optimizer updates the weights."""
        return objective.gradient()

    def latent_shifts(self, objective: LatentObjective) -> Mapping[int, Tensor] | None:
        """Returns the shifts [B, S, H] of decoder layers under which a micro-batch is trained, None for no shifts."""
        return None

    def after_step(self, weights: Mapping[str, Tensor], step: int) -> None:
        """Observes the weights after an optimizer step.

        Args:
            weights: The trainable parameters by name. They must not be changed.
            step: The number of finished optimizer steps.
        """

    def final_weights(self) -> Mapping[str, Tensor] | None:
        """Returns the weights of the trained model, or None for those of the last step."""
        return None

    def state(self) -> dict[str, Tensor]:
        """Returns everything that a checkpoint must contain for an exact resume, apart from the weights."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restores the values that `state` returned."""

    @classmethod
    def overrides(cls, hook: str) -> bool:
        """Returns whether the defense overrides a method of the base class, such as ``forget_gradient``."""
        return getattr(cls, hook) is not getattr(Defense, hook)


DEFENSES: Registry[type[Defense]] = plugins.DEFENSES


def register(name: str, source: str) -> Callable[[type[Defense]], type[Defense]]:
    """Returns a class decorator that registers a defense.

    Args:
        name: The name of the defense in recipes.
        source: The paper and its arXiv number.

    Raises:
        UserError: Another module has registered a defense of that name.
    """

    def add(defense: type[Defense]) -> type[Defense]:
        defense.name = name
        defense.source = source
        return DEFENSES.register(name)(defense)

    return add


_EFFECTS = {  # of the methods that at most one defense of a run overrides
    "forget_gradient": "replace the gradient of the forget terms",
    "latent_shifts": "shift hidden states",
    "final_weights": "replace the trained weights",
}


def build_defenses(configs: Sequence[DefenseConfig]) -> tuple[Defense, ...]:
    """Returns the defenses of a recipe in their order.

    Raises:
        UserError: A defense or one of its options is unknown, a value is invalid, or two defenses change the same.
    """
    defenses = []
    for config in configs:
        plugin = DEFENSES.load(config.name, "defense")
        if not (isinstance(plugin, type) and issubclass(plugin, Defense)):
            raise plugins.invalid_plugin("defense", config.name, plugin, "a subclass of Defense", "defense")
        options = dict(config.model_extra or {})
        defenses.append(plugin(validate(plugin.options_type, options, f"defense {config.name}")))
    for hook, effect in _EFFECTS.items():
        names = [config.name for config, item in zip(configs, defenses, strict=True) if item.overrides(hook)]
        if len(names) > 1:
            raise UserError(
                f"{' and '.join(names)} both {effect}. Keep one of them.", code="conflicting-settings", field="defense"
            )
    return tuple(defenses)


def norm(gradient: Weights) -> Tensor:
    """Returns [], the Euclidean norm over all tensors, in float32."""
    if not gradient:
        return torch.zeros(())
    norms = [torch.linalg.vector_norm(value, dtype=torch.float32) for value in gradient.values()]
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return total


def scaled_to(gradient: Weights, radius: float) -> Weights:
    """Scales a gradient in place to a norm, and returns it. A gradient of zeros stays zero."""
    factor = radius / norm(gradient).clamp(min=1e-12)
    for value in gradient.values():
        value.mul_(factor.to(value.dtype))
    return gradient
