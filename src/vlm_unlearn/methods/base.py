"""The contract between a method and the trainer, and the registry of methods.

A method says what it needs (`needs`) and turns one step into a loss. It knows neither the trainer nor the model: it asks
the step for likelihoods and hidden states, and the trainer provides the reference values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from vlm_unlearn.config import MethodConfig, Strict, validate
from vlm_unlearn.errors import RequestError, nearest

Role = Literal["forget", "retain", "decouple"]


@dataclass(frozen=True)
class ReferenceNLL:
    """Need: each sample's answer NLL under the model as it was before training."""

    role: Role


@dataclass(frozen=True)
class ReferenceHidden:
    """Need: hidden states of a decoder layer under the model as it was before training."""

    role: Role


Need = ReferenceNLL | ReferenceHidden


@dataclass(frozen=True)
class LossOutput:
    """`total` is what is minimised; `parts` are logged by name."""

    total: Tensor
    parts: Mapping[str, Tensor]


class Step(Protocol):
    """One step's batches, seen through the model. Values are computed once, when first asked for."""

    def nll(self, role: Role, reduction: Literal["mean", "sum"] = "mean") -> Tensor:
        """[B] answer NLL of each sample: token mean or sequence sum."""

    def cross_entropy(self, *roles: Role) -> Tensor:
        """[] mean over all answer tokens of the roles' batches together, as transformers computes it for one batch."""

    def reference_nll(self, role: Role, reduction: Literal["mean", "sum"] = "mean") -> Tensor:
        """[B] `nll` under the reference model."""

    def batch_nll(self, role: Role) -> tuple[Tensor, Tensor]:
        """([], []) token mean over the whole batch under the current and the reference model."""

    def hidden(self, role: Role) -> Tensor:
        """[B, S, H] output of the decoder layer that `Method.hidden_layer` names."""

    def reference_hidden(self, role: Role) -> Tensor:
        """[B, S, H] `hidden` under the reference model, without gradient."""

    def attention_mask(self, role: Role) -> Tensor:
        """[B, S] 1 on real tokens, 0 on padding."""


class NoOptions(Strict):
    """A method without options."""


class Method:
    """Base of all methods. Subclasses set `options_type` and `needs`, and write `loss`."""

    name: ClassVar[str]
    source: ClassVar[str]  # paper and where to find it
    options_type: ClassVar[type[Strict]] = NoOptions
    forget_answers: ClassVar[Literal["given", "refusal"]] = "given"  # what the forget questions are answered with in training
    forgets_answers: ClassVar[bool] = True  # whether training moves away from the forget answers, not towards them
    forget_as_one_turn: ClassVar[bool] = False  # question and answer in one human turn (RMU)

    def __init__(self, options: Strict) -> None:
        self.options: Any = options

    @property
    def needs(self) -> tuple[Need, ...]:
        """What must be known of the reference model."""
        return ()

    @property
    def roles(self) -> tuple[Role, ...]:
        """The sets that a step draws from."""
        return ("forget", "retain")

    @property
    def hidden_layer(self) -> int | None:
        """The decoder layer (0 is the first) whose output the loss uses; None if it uses none."""
        return None

    def prepare(self, hidden_size: int, layers: int, generator: torch.Generator) -> None:
        """Called once before training, with the language model's hidden size and number of decoder layers."""

    def loss(self, step: Step) -> LossOutput:
        """The loss of one step."""
        raise NotImplementedError(f"{type(self).__name__} has no loss")

    def state(self) -> dict[str, Tensor]:
        """Tensors that belong with the checkpoint, such as RMU's control vector."""
        return {}


METHODS: dict[str, type[Method]] = {}


def register(name: str, source: str) -> Callable[[type[Method]], type[Method]]:
    """Class decorator that makes a method known under `name`."""

    def add(method: type[Method]) -> type[Method]:
        method.name = name
        method.source = source
        METHODS[name] = method
        return method

    return add


def build_method(config: MethodConfig, prompt_decouple_weight: float) -> Method:
    """The method that a recipe names, wrapped in prompt decoupling when its weight is above 0.

    Raises:
        RequestError: the method or one of its options is unknown, or an option's value is wrong.
    """
    from vlm_unlearn.methods.prompt_decouple import PromptDecouple

    if config.name not in METHODS:
        raise RequestError(f'unknown method "{config.name}"{nearest(config.name, METHODS)} known: {", ".join(sorted(METHODS))}')
    kind = METHODS[config.name]
    method = kind(validate(kind.options_type, dict(config.model_extra or {}), f"method {config.name}"))
    return PromptDecouple(method, prompt_decouple_weight) if prompt_decouple_weight > 0 else method
