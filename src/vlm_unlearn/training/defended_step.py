"""The gradients of an optimizer step with defenses (`vlm_unlearn.methods.wrappers`).

The loss of a method is a sum of terms. The forget terms use the roles ``forget`` and ``preferred``, and the other terms
use ``retain`` and ``decouple``. Both have their own forward and backward passes, over all micro-batches of the step:

1. A defense computes the gradient of the forget terms, for example twice at different weights (SAM).
2. The gradient of the other terms is added, at the weights of the model.

All processes have the same gradients, and thus the same perturbations. Only trainable parameters are perturbed, so that
the features of a frozen vision tower stay valid.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlm_unlearn.data.encoding import Batch
from vlm_unlearn.errors import UserError
from vlm_unlearn.losses import IGNORED
from vlm_unlearn.methods import LossOutput, Role
from vlm_unlearn.methods.wrappers import FORGET_ROLES, Defense, Weights
from vlm_unlearn.modeling.vlm import VisionLanguageModel
from vlm_unlearn.training.passes import MicroBatch
from vlm_unlearn.training.step import ModelStep


def validate_engine(sharded: bool) -> None:
    """Validates that the engine supports defenses.

    Raises:
        UserError: FSDP or DeepSpeed shards the parameters.
    """
    if sharded:
        raise UserError(
            "a defense does not work with FSDP or DeepSpeed, whose shards it would have to perturb. Use "
            "recipes/engines/ddp.yaml.",
            code="unsupported-setting",
            field="defense",
        )


@contextmanager
def swapped_weights(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Gives parameters other values for the duration of the block. Their own values are restored to the bit.

    Args:
        parameters: The parameters by name.
        values: The values by name, with the shapes and devices of the parameters. Other parameters stay as they are.
    """
    originals = {name: parameters[name].data for name in values}
    try:
        for name, value in values.items():
            parameters[name].data = value.to(originals[name].dtype)
        torch.clear_autocast_cache()  # its bf16 casts belong to the other values
        yield
    finally:
        for name, original in originals.items():
            parameters[name].data = original
        torch.clear_autocast_cache()


@dataclass(frozen=True)
class StepContext:
    """What a step needs of the trainer."""

    vlm: VisionLanguageModel
    parameters: Mapping[str, nn.Parameter]  # the trainable ones
    build_step: Callable[[MicroBatch, Collection[Role]], ModelStep]  # with the active roles
    loss: Callable[[ModelStep], LossOutput]
    autocast: Callable[[], AbstractContextManager[object]]
    backward: Callable[[Tensor], None]
    average: Callable[[Tensor], Tensor] | None  # over processes. None for a single process
    step: int  # the number of finished optimizer steps
    seed: int


def validate_sum_of_terms(context: StepContext, batches: MicroBatch) -> None:
    """Validates on one micro-batch that the loss is the sum of its forget terms and its other terms.

    Without dropout, so that it uses no random numbers.

    Raises:
        UserError: The loss has a term that uses roles of both kinds, such as a product.
    """
    other_roles = [role for role in batches if role not in FORGET_ROLES]
    model, was_training = context.vlm.model, context.vlm.model.training
    model.eval()
    try:
        with torch.no_grad(), context.autocast():
            loss, forget, other, constant = (
                context.loss(context.build_step(batches, roles)).total.float()
                for roles in (batches.keys(), FORGET_ROLES, other_roles, ())
            )
    finally:
        model.train(was_training)
    if not torch.isclose(forget + other - constant, loss, rtol=0.02, atol=0.02):
        raise UserError(
            "the loss of the method is not a sum of terms on forget examples and terms on other examples, which a "
            "defense needs.",
            code="unsupported-setting",
            field="defense",
        )


class DefendedStep:
    """Computes the gradients of one optimizer step with defenses. Implements `ForgetObjective`.

    Args:
        context: The model, the method and the functions of the trainer.
        micro_batches: All micro-batches of the step in this process, on the model's device.
        defenses: The defenses of the run.
    """

    def __init__(self, context: StepContext, micro_batches: Sequence[MicroBatch], defenses: Sequence[Defense]) -> None:
        self.step = context.step
        self.seed = context.seed
        self._context = context
        self._micro_batches = micro_batches
        self._gradient_defense = next((item for item in defenses if item.overrides("forget_gradient")), Defense())
        self._latent_defense = next((item for item in defenses if item.overrides("latent_shifts")), None)
        self._forget_outputs: list[LossOutput] = []  # of the first pass

    def run(self) -> list[LossOutput]:
        """Sets the gradients of the trainable parameters, and returns the loss and its terms of each micro-batch.

        The forget terms have the values of the first pass, which is at the weights of the model with `sam` and `gp`.
        """
        other_outputs = self._set_gradients(self._gradient_defense.forget_gradient(self))
        return [
            _combined(forget, other, self._constant_loss(batches))
            for forget, other, batches in zip(self._forget_outputs, other_outputs, self._micro_batches, strict=True)
        ]

    # ForgetObjective

    def parameters(self) -> Mapping[str, Tensor]:
        return self._context.parameters

    def gradient(self, shift: Weights | None = None) -> Weights:
        parameters = self._context.parameters
        if shift is not None:
            with torch.no_grad():
                for name, value in shift.items():
                    value.add_(parameters[name])
        self._clear_gradients()
        outputs = []
        with swapped_weights(parameters, shift or {}):
            for batches in self._micro_batches:
                with self._attacked(batches):
                    outputs.append(self._backward(batches, FORGET_ROLES))
        self._forget_outputs = self._forget_outputs or outputs
        return self._take_gradients()

    # Passes

    def _backward(self, batches: MicroBatch, roles: Collection[Role]) -> LossOutput:
        """Adds the gradient of the terms on some roles, divided by the number of micro-batches."""
        if self._latent_defense is not None and roles is FORGET_ROLES:
            batches = _without_prefix_sharing(batches)
        with self._context.autocast():
            output = self._context.loss(self._context.build_step(batches, roles))
        if output.total.requires_grad:  # a role whose terms have weight 0 gives a constant
            self._context.backward(output.total / len(self._micro_batches))
        return LossOutput(output.total.detach(), {name: value.detach() for name, value in output.terms.items()})

    def _set_gradients(self, forget: Weights) -> list[LossOutput]:
        """Sets the gradients of the parameters: those of the forget terms, plus those of all other terms."""
        # The gradients of the forget terms are the same in all processes, so that averaging the sums keeps them.
        for name, parameter in self._context.parameters.items():
            parameter.grad = forget.get(name)
        outputs = []
        for batches in self._micro_batches:
            roles = [role for role in batches if role not in FORGET_ROLES]
            outputs.append(self._backward(batches, roles) if roles else self._constant_loss(batches))
        for name, gradient in self._take_gradients().items():
            self._context.parameters[name].grad = gradient
        return outputs

    def _constant_loss(self, batches: MicroBatch) -> LossOutput:
        """Returns the loss if no role is active."""
        with torch.no_grad():
            return self._context.loss(self._context.build_step(batches, ()))

    def _take_gradients(self) -> Weights:
        """Removes the gradients from the parameters and returns them, averaged over all processes."""
        parameters, average = self._context.parameters, self._context.average
        gradients = {name: value.grad for name, value in parameters.items() if value.grad is not None}
        self._clear_gradients()
        if average is None:
            return gradients
        # A parameter may have a gradient in some processes only, such as the projector on batches without images.
        device = next(iter(parameters.values())).device
        used = average(torch.tensor([float(name in gradients) for name in parameters], device=device)).tolist()
        return {
            name: average(gradients.pop(name, torch.zeros_like(value)))
            for (name, value), fraction in zip(parameters.items(), used, strict=True)
            if fraction > 0
        }

    def _clear_gradients(self) -> None:
        for parameter in self._context.parameters.values():
            parameter.grad = None

    # Latent attacks

    @contextmanager
    def _attacked(self, batches: MicroBatch) -> Iterator[None]:
        """Shifts the hidden states of a micro-batch's forget terms for the duration of the block."""
        if self._latent_defense is None:
            yield
            return
        objective = _MicroBatchLatents(self._context, _without_prefix_sharing(batches))
        shifts = self._latent_defense.latent_shifts(objective)
        with ExitStack() as cleanup:
            if shifts is not None:
                cleanup.enter_context(self._context.vlm.shifted_layers(shifts))
            yield


class _MicroBatchLatents:
    """The forget terms of one micro-batch as a function of its hidden states. Implements `LatentObjective`.

    Args:
        context: The model, the method and the functions of the trainer.
        batches: The micro-batch, without the keys of its images.
    """

    def __init__(self, context: StepContext, batches: MicroBatch) -> None:
        self._context = context
        self._batches = batches
        self._rows = context.build_step(batches, FORGET_ROLES).passes.merged_inputs()

    def mask(self) -> Tensor:
        tokens = self._rows["attention_mask"].bool()
        if "labels" not in self._rows:
            return tokens
        # Everything from the first answer token on is excluded, also later questions of a conversation.
        return tokens & ((self._rows["labels"] != IGNORED).cumsum(dim=1) == 0)

    def zeros(self, layers: Sequence[int]) -> dict[int, Tensor]:
        rows, width = self._rows["input_ids"].shape
        shape, device = (rows, width, self._context.vlm.hidden_size), self._rows["input_ids"].device
        return {layer: torch.zeros(shape, device=device) for layer in layers}

    def gradient(self, shifts: Mapping[int, Tensor]) -> dict[int, Tensor]:
        variables = {layer: shift.detach().requires_grad_() for layer, shift in shifts.items()}
        with self._context.vlm.shifted_layers(variables):
            with self._context.autocast():
                total = self._context.loss(self._context.build_step(self._batches, FORGET_ROLES)).total
            gradients = torch.autograd.grad(total, list(variables.values()), materialize_grads=True)
        return dict(zip(variables, gradients, strict=True))


def _without_prefix_sharing(batches: MicroBatch) -> dict[Role, Batch]:
    """Returns the batches without the keys of their images: each question has hidden states of its own."""
    return {role: {name: value for name, value in batch.items() if name != "images"} for role, batch in batches.items()}


def _combined(forget: LossOutput, other: LossOutput, constant: LossOutput) -> LossOutput:
    """Returns the loss of all roles.

    In each of the two outputs, the terms on the roles of the other one are constants, which `constant` has too.
    """
    terms = {name: forget.terms[name] + other.terms[name] - constant.terms[name] for name in forget.terms}
    return LossOutput(forget.total + other.total - constant.total, terms)
