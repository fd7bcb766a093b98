"""Prompt decoupling: a wrapper that any method can wear."""

from __future__ import annotations

import torch
from torch import Tensor

from vlm_unlearn.methods.base import LossOutput, Method, ReferenceRequirement, Role, Step


class PromptDecouple(Method):
    """SafeEraser's Prompt Decouple loss (arXiv 2502.12520) on top of another method.

    Adds ``weight * CE`` on the same unsafe questions asked of a benign image and answered normally, so that the model
    unlearns the harm and not the question. The decouple sample is the one paired with the forget sample (the published code
    loses the pairing; see docs/published.md).
    """

    def __init__(self, method: Method, weight: float) -> None:
        super().__init__(method.options)
        self.method = method
        self.weight = weight
        # What the batches look like is the wrapped method's to say.
        self.forget_target = method.forget_target  # type: ignore[misc]
        self.unlearns = method.unlearns  # type: ignore[misc]
        self.append_answer_to_prompt = method.append_answer_to_prompt  # type: ignore[misc]
        self.preferred_answers = method.preferred_answers  # type: ignore[misc]

    @property
    def reference_requirements(self) -> tuple[ReferenceRequirement, ...]:
        return self.method.reference_requirements

    @property
    def roles(self) -> tuple[Role, ...]:
        return (*self.method.roles, "decouple")

    @property
    def hidden_layers(self) -> tuple[int, ...]:
        return self.method.hidden_layers

    @property
    def truncated_forward_roles(self) -> tuple[Role, ...]:
        return self.method.truncated_forward_roles

    @property
    def full_logit_roles(self) -> tuple[Role, ...]:
        return self.method.full_logit_roles

    def prepare(self, hidden_size: int, layers: int, generator: torch.Generator) -> None:
        self.method.prepare(hidden_size, layers, generator)

    def loss(self, step: Step) -> LossOutput:
        output = self.method.loss(step)
        decouple = step.cross_entropy("decouple")
        return LossOutput(output.total + self.weight * decouple, {**output.terms, "decouple": decouple})

    def state(self) -> dict[str, Tensor]:
        return self.method.state()
