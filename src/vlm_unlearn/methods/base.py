"""The contract between a method and the trainer, and the registry of methods.

A method says what it needs (`reference_requirements`) and turns one step into a loss. It knows neither the trainer nor the model: it asks
the step for likelihoods and hidden states, and the trainer provides the reference values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor

from vlm_unlearn.config import MethodConfig, Strict, validate
from vlm_unlearn.errors import UserError, nearest

NonNegative = Annotated[float, Field(ge=0)]
Role = Literal["forget", "retain", "decouple", "preferred"]
TokenKind = Literal["all", "answer"]  # all tokens but padding, or those of the answers


@dataclass(frozen=True)
class ReferenceNLL:
    """ReferenceRequirement: each sample's answer NLL under the model as it was before training."""

    role: Role


@dataclass(frozen=True)
class ReferenceHidden:
    """ReferenceRequirement: hidden states of `Method.hidden_layers` under the model as it was before training."""

    role: Role


@dataclass(frozen=True)
class ReferenceLogits:
    """ReferenceRequirement: logits at the answer positions under the model as it was before training."""

    role: Role


ReferenceRequirement = ReferenceNLL | ReferenceHidden | ReferenceLogits


@dataclass(frozen=True)
class LossOutput:
    """`total` is what is minimised; `terms` are logged by name."""

    total: Tensor
    terms: Mapping[str, Tensor]


class Step(Protocol):
    """One step's batches, seen through the model. Values are computed once, when first asked for.

    What is a mean over tokens weighs each token of the *optimizer step* the same, over all its micro-batches and processes, so
    that a batch gives the same gradient however it is split; with `paper_compat`, each micro-batch weighs the same, as published.
    """

    progress: float  # share of the run's optimizer steps that are done, 0 at the first

    def nll(self, role: Role, reduction: Literal["mean", "sum"] = "mean") -> Tensor:
        """[B] answer NLL of each sample: token mean or sequence sum."""

    def cross_entropy(self, *roles: Role) -> Tensor:
        """[] mean over all answer tokens of the roles' batches together, as transformers computes it for one batch."""

    def reference_nll(self, role: Role, reduction: Literal["mean", "sum"] = "mean") -> Tensor:
        """[B] `nll` under the reference model."""

    def batch_nll(self, role: Role) -> tuple[Tensor, Tensor]:
        """([], []) token mean over the whole batch under the current and the reference model."""

    def logits(self, role: Role) -> Tensor:
        """[B, K, V] at the K columns from before the first answer token to the last, zeros where no answer token is next; all S
        columns for `Method.full_logit_roles`."""

    def reference_logits(self, role: Role) -> Tensor:
        """[B, K, V] `logits` under the reference model, without gradient."""

    def labels(self, role: Role) -> Tensor:
        """[B, K] labels of the columns that `logits` has."""

    def hidden(self, role: Role, layer: int) -> Tensor:
        """[B, S, H] output of a decoder layer out of `Method.hidden_layers`."""

    def reference_hidden(self, role: Role, layer: int) -> Tensor:
        """[B, S, H] `hidden` under the reference model, without gradient."""

    def attention_mask(self, role: Role) -> Tensor:
        """[B, S] 1 on real tokens, 0 on padding."""

    def answer_mask(self, role: Role) -> Tensor:
        """[B, S] True where the next token is an answer token."""

    def token_weight(self, role: Role, kind: TokenKind) -> Tensor:
        """[] what a mean over this micro-batch's real (or answer) tokens must be multiplied by to weigh each token of the step alike."""


class Options(Strict):
    """What every method can be told."""

    renamed_keys: ClassVar[Mapping[str, str]] = {"paper": "paper_compat"}

    paper_compat: bool = False
    """The published code's counting; docs/published.md says what differs."""


class Method:
    """Base of all methods. Subclasses set `options_type` and `reference_requirements`, and write `loss`."""

    name: ClassVar[str]
    source: ClassVar[str]  # paper and where to find it
    options_type: ClassVar[type[Options]] = Options
    forget_target: ClassVar[Literal["original", "refusal"]] = (
        "original"  # what the forget questions are answered with in training
    )
    unlearns: ClassVar[bool] = True  # whether training moves away from the forget answers, not towards them
    layer_option: ClassVar[str] = "layer"  # the option that `hidden_layers` come from
    append_answer_to_prompt: ClassVar[bool] = False  # question and answer in one human turn (RMU)
    preferred_answers: ClassVar[Literal["refusal", "data"] | None] = (
        None  # where the answers of the role "preferred" come from
    )

    def __init__(self, options: Options) -> None:
        self.options: Any = options

    @property
    def reference_requirements(self) -> tuple[ReferenceRequirement, ...]:
        """What must be known of the reference model."""
        return ()

    @property
    def roles(self) -> tuple[Role, ...]:
        """The sets that a step draws from."""
        return ("forget", "retain")

    @property
    def hidden_layers(self) -> tuple[int, ...]:
        """The decoder layers (0 is the first) whose outputs the loss uses."""
        return ()

    @property
    def truncated_forward_roles(self) -> tuple[Role, ...]:
        """Roles of whose pass the loss uses `hidden` alone: the layers above are left out. One role at least must go through them all."""
        return ()

    @property
    def full_logit_roles(self) -> tuple[Role, ...]:
        """Roles whose logits the loss uses at every position, not at the answers only."""
        return ()

    @property
    def paper_compat(self) -> bool:
        """Whether the published code's counting is asked for."""
        return bool(self.options.paper_compat)

    def prepare(self, hidden_size: int, layers: int, generator: torch.Generator) -> None:
        """Called once before training, with the language model's hidden size and number of decoder layers.

        Raises:
            UserError: an option doesn't fit the model, such as a layer that it doesn't have.
        """
        for layer in self.hidden_layers:
            if layer >= layers:
                raise UserError(
                    f"method.{self.layer_option}: {layer} out of range; the model has decoder layers 0 to {layers - 1}"
                )

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
        UserError: the method or one of its options is unknown, or an option's value is wrong.
    """
    from vlm_unlearn.methods.prompt_decouple import PromptDecouple

    if config.name not in METHODS:
        raise UserError(
            f'unknown method "{config.name}"{nearest(config.name, METHODS)}; known: {", ".join(sorted(METHODS))}'
        )
    kind = METHODS[config.name]
    method = kind(validate(kind.options_type, dict(config.model_extra or {}), f"method {config.name}"))
    return PromptDecouple(method, prompt_decouple_weight) if prompt_decouple_weight > 0 else method
