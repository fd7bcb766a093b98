"""The interface between methods and the trainer, and the registry of methods.

A method declares what its loss needs of the forward passes (`requirements`) and computes the loss of a step. It
depends on neither the trainer nor the model: it requests likelihoods and hidden states from the step, and the
trainer provides reference values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor

from vlm_unlearn import plugins
from vlm_unlearn.config import MethodConfig, Strict, validate
from vlm_unlearn.errors import UserError
from vlm_unlearn.plugins import Registry

NonNegative = Annotated[float, Field(ge=0)]
Role = Literal["forget", "retain", "decouple", "preferred", "retain_reference"]
# `retain_reference` is a second retain batch, whose terms compare the current model with the reference model. Only
# Safety Mirage's released code has it.
PublishedCode = Literal["safe_eraser", "safety_mirage"]
TokenKind = Literal["all", "answer"]  # all tokens except padding, or answer tokens only


@dataclass(frozen=True)
class ReferenceNLL:
    """Requires each sample's answer NLL under the reference model, which has the weights from before training."""

    role: Role


@dataclass(frozen=True)
class ReferenceHidden:
    """Requires the hidden states of `ForwardRequirements.hidden_layers` under the reference model."""

    role: Role


@dataclass(frozen=True)
class ReferenceLogits:
    """Requires the logits at the answer positions under the reference model."""

    role: Role


ReferenceRequirement = ReferenceNLL | ReferenceHidden | ReferenceLogits


@dataclass(frozen=True)
class ForwardRequirements:
    """The batches of a training step, and the outputs of the current and the reference model that a loss uses.

    The defaults fit a method that uses only likelihoods under the current model.

    Args:
        roles: The roles of a step's batches.
        references: The values under the reference model.
        hidden_layers: The decoder layers whose outputs the loss uses, 0 the first.
        truncated_roles: The roles of which the loss uses only hidden states, so that their forward pass can skip the
            layers above. At least one role must not be among them.
        full_logit_roles: The roles of which the loss uses the logits at every position instead of only those of the
            answers.
    """

    roles: tuple[Role, ...] = ("forget", "retain")
    references: tuple[ReferenceRequirement, ...] = ()
    hidden_layers: tuple[int, ...] = ()
    truncated_roles: tuple[Role, ...] = ()
    full_logit_roles: tuple[Role, ...] = ()


@dataclass(frozen=True)
class LossOutput:
    """A method's loss."""

    total: Tensor  # [] the value to minimize
    terms: Mapping[str, Tensor]  # [] each, unweighted, logged by name


class Step(Protocol):
    """The values of one training step that a loss can request. Each is computed once, at the first request.

    A role's batch has B samples and S positions. V is the vocabulary size and H the hidden size. The reference
    model has the weights from before training.

    A mean over tokens gives each token of the *optimizer step* the same weight, over all its micro-batches and
    processes, so that the gradient does not depend on how a batch is split. With `paper_compat`, each micro-batch
    has the same weight, as in the published code.
    """

    progress: float  # fraction of the run's optimizer steps that are complete, 0 at the first step
    width: int  # the number of positions of the longest batch

    def nll(self, role: Role, reduction: Literal["mean", "sum"] = "mean") -> Tensor:
        """Returns [B], the answer NLL of each sample as a token mean or a sequence sum."""

    def cross_entropy(self, *roles: Role) -> Tensor:
        """Returns [], the mean over all answer tokens of the roles, as transformers computes it for one batch."""

    def reference_nll(self, role: Role, reduction: Literal["mean", "sum"] = "mean") -> Tensor:
        """Returns [B], `nll` under the reference model."""

    def micro_batch_nll(self, role: Role) -> tuple[Tensor, Tensor]:
        """Returns ([], []), the token mean over the entire batch under the current and the reference model."""

    def logits(self, role: Role) -> Tensor:
        """Returns [B, K, V], the logits of K columns: from the one before the first answer token to that of the last.

        The logits are zero at positions that do not precede an answer token. For roles in
        `ForwardRequirements.full_logit_roles`, the logits of all S columns are returned.
        """

    def reference_logits(self, role: Role) -> Tensor:
        """Returns [B, K, V], `logits` under the reference model, without gradient."""

    def labels(self, role: Role) -> Tensor:
        """Returns [B, K], the labels of the columns of `logits`."""

    def hidden(self, role: Role, layer: int) -> Tensor:
        """Returns [B, S, H], the output of a decoder layer in `ForwardRequirements.hidden_layers`."""

    def reference_hidden(self, role: Role, layer: int) -> Tensor:
        """Returns [B, S, H], `hidden` under the reference model, without gradient."""

    def attention_mask(self, role: Role) -> Tensor:
        """Returns [B, S], 1 on tokens and 0 on padding."""

    def answer_mask(self, role: Role) -> Tensor:
        """Returns [B, S], True where the next token is an answer token."""

    def token_weight(self, role: Role, kind: TokenKind) -> Tensor:
        """Returns [], the factor on a mean over this micro-batch's tokens of one kind.

        With this factor, all tokens of the optimizer step have the same weight.
        """


class Options(Strict):
    """The options of all methods."""

    renamed_keys: ClassVar[Mapping[str, str]] = {"paper": "paper_compat"}

    paper_compat: bool | Literal["full"] = False
    """`true` reproduces how the published code averages, `full` also its texts, order of samples and schedule.

    docs/published.md lists the differences.
    """


class Method:
    """Base class of all methods. Subclasses set `options_type`, and implement `requirements` and `loss`."""

    name: ClassVar[str] = ""
    source: ClassVar[str] = ""
    """The paper and its arXiv number."""
    options_type: ClassVar[type[Options]] = Options
    forget_target: ClassVar[Literal["original", "refusal"]] = "original"
    """The answers to the forget questions in training: those of the data set, or random refusals."""
    unlearns: ClassVar[bool] = True
    """Whether training makes the forget answers less likely rather than more likely."""
    tiny_options: ClassVar[Mapping[str, Any]] = {}
    """Options that differ from the defaults for a model of two decoder layers, as tests and the full demo use."""
    layer_option: ClassVar[str] = "layer"
    """The name of the option that determines `ForwardRequirements.hidden_layers`."""
    published_code: ClassVar[PublishedCode | None] = None
    """The released training code that ``paper_compat: full`` reproduces. None does not offer it."""
    append_answer_to_prompt: ClassVar[bool] = False
    """Whether question and answer of a forget example form one user turn, as in RMU."""
    preferred_answers: ClassVar[Literal["refusal", "data"] | None] = None
    """The source of the answers of the role ``preferred``."""

    def __init__(self, options: Options) -> None:
        self.options: Any = options

    @property
    def requirements(self) -> ForwardRequirements:
        """What the loss needs of the forward passes. It may depend on the options."""
        return ForwardRequirements()

    @property
    def paper_compat(self) -> bool:
        """Whether the method reproduces how the published code averages."""
        return bool(self.options.paper_compat)

    @property
    def reproduced_code(self) -> PublishedCode | None:
        """The released training code that the method reproduces in everything, with ``paper_compat: full``."""
        return self.published_code if self.options.paper_compat == "full" else None

    @property
    def reference_retain_role(self) -> Role:
        """The role of the retain batch that is compared with the reference model."""
        return "retain_reference" if self.reproduced_code == "safety_mirage" else "retain"

    @property
    def retain_roles(self) -> tuple[Role, ...]:
        """The role ``retain`` if the option `retain_weight` is above 0, as no other term uses it.

        The released code runs the retain batch in any case, and its lengths count in averages.
        """
        return ("retain",) if self.options.retain_weight or self.reproduced_code else ()

    def with_retain(self, step: Step, total: Tensor, terms: Mapping[str, Tensor]) -> LossOutput:
        """Returns a loss and its terms with the cross-entropy on retain answers, if it has a weight."""
        if not self.retain_roles:
            return LossOutput(total, terms)
        retain = step.cross_entropy("retain")
        return LossOutput(total + self.options.retain_weight * retain, {**terms, "retain": retain})

    def active_roles(self, _progress: float) -> tuple[Role, ...]:
        """Returns the roles that the loss uses at a fraction of the run. The model does not run the others."""
        return self.requirements.roles

    def prepare(self, hidden_size: int, layers: int, generator: torch.Generator) -> None:
        """Prepares the method for a model. The trainer calls this once before training.

        Args:
            hidden_size: The language model's hidden size.
            layers: The number of its decoder layers.
            generator: The source of all random values of the method.

        Raises:
            UserError: An option does not fit the model, for example a layer that does not exist.
        """
        for layer in self.requirements.hidden_layers:
            if layer >= layers:
                raise UserError(
                    f"{layer} is out of range. The model has decoder layers 0 to {layers - 1}.",
                    code="out-of-range",
                    field=f"method.{self.layer_option}",
                )

    def loss(self, step: Step) -> LossOutput:
        """Returns the loss of one step."""
        raise NotImplementedError(f"{type(self).__name__} does not implement loss()")

    def state(self) -> dict[str, Tensor]:
        """Returns tensors to save with the model, such as RMU's control vector."""
        return {}


METHODS: Registry[type[Method]] = plugins.METHODS


def register(name: str, source: str) -> Callable[[type[Method]], type[Method]]:
    """Returns a class decorator that registers a method.

    Args:
        name: The name of the method in recipes.
        source: The paper and its arXiv number.

    Raises:
        UserError: Another module has registered a method of that name.
    """

    def add(method: type[Method]) -> type[Method]:
        method.name = name
        method.source = source
        return METHODS.register(name)(method)

    return add


def get_method(name: str) -> type[Method]:
    """Returns the class of a method.

    Args:
        name: The name of the method, or ``FILE.py:CLASS``.

    Raises:
        UserError: There is no such method, or the object is not a method.
    """
    method = METHODS.load(name, "method")
    if not (isinstance(method, type) and issubclass(method, Method)):
        raise plugins.invalid_plugin("method", name, method, "a subclass of Method", "method")
    if not method.name:
        method.name = plugins.short_name(name)
    return method


def method_name(method: type) -> str:
    """Returns the name of a class of a method, under which it is registered if it was not.

    Raises:
        UserError: The class is not a method, or another module has registered a method of its name.
    """
    if not issubclass(method, Method):
        raise plugins.invalid_plugin("method", method.__name__, method, "a subclass of Method", "method")
    if METHODS.get(method.name) is not method:
        method.name = method.name or method.__name__
        METHODS.register(method.name)(method)
    return method.name


def build_method(config: MethodConfig, prompt_decouple_weight: float) -> Method:
    """Returns the method of a recipe, wrapped in prompt decoupling if its weight is above 0.

    Raises:
        UserError: The method or one of its options is unknown, or the value of an option is invalid.
    """
    from vlm_unlearn.methods.wrappers.prompt_decouple import PromptDecouple

    method_type = get_method(config.name)
    options = validate(method_type.options_type, dict(config.model_extra or {}), f"method {config.name}")
    method = method_type(options)
    if options.paper_compat == "full":
        _validate_published(method, prompt_decouple_weight > 0)
    return PromptDecouple(method, prompt_decouple_weight) if prompt_decouple_weight > 0 else method


def _validate_published(method: Method, decouples: bool) -> None:
    """Validates that released code exists for a method and its options.

    Raises:
        UserError: It does not.
    """
    problem = None
    if method.published_code is None:
        problem = f"full is offered for {', '.join(_methods_with_released_code())}"
    elif decouples and method.published_code == "safety_mirage":
        problem = f"the released code of {method.name} has no prompt decoupling"
    elif method.preferred_answers is not None:
        problem = f"the released code of {method.name} trains no refusals"
    elif getattr(method.options, "max_nll", None) is not None:
        problem = f"the released code of {method.name} has no max_nll"
    if problem is not None:
        raise UserError(
            f"{problem}. Use paper_compat: true, which reproduces the averages.",
            code="unsupported-setting",
            field="method.paper_compat",
        )


def _methods_with_released_code() -> list[str]:
    return sorted(name for name in METHODS.built_in if get_method(name).published_code is not None)
