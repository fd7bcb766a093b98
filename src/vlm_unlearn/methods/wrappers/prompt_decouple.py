"""Prompt decoupling, a wrapper for any method."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vlm_unlearn.methods.base import ForwardRequirements, LossOutput, Method, Role, Step


class PromptDecouple(Method):
    """SafeEraser's Prompt Decouple loss (arXiv 2502.12520) on top of another method.

    Adds ``weight * CE`` on the same unsafe questions with a benign image and a normal answer, so that the model
    unlearns the harm and not the question. Each decouple sample is the one paired with the forget sample. The
    published code loses this pairing (see docs/published.md).

    Args:
        method: The wrapped method.
        weight: The weight of the cross-entropy on decouple answers.
    """

    def __init__(self, method: Method, weight: float) -> None:
        super().__init__(method.options)
        self.method = method
        self.weight = weight
        # The wrapped method determines the contents of the batches.
        self.forget_target = method.forget_target  # type: ignore[misc]
        self.unlearns = method.unlearns  # type: ignore[misc]
        self.layer_option = method.layer_option  # type: ignore[misc]
        self.append_answer_to_prompt = method.append_answer_to_prompt  # type: ignore[misc]
        self.preferred_answers = method.preferred_answers  # type: ignore[misc]
        self.published_code = method.published_code  # type: ignore[misc]

    @property
    def requirements(self) -> ForwardRequirements:
        requirements = self.method.requirements
        return replace(requirements, roles=(*requirements.roles, "decouple"))

    def active_roles(self, progress: float) -> tuple[Role, ...]:
        return (*self.method.active_roles(progress), "decouple")

    def prepare(self, hidden_size: int, layers: int, generator: torch.Generator) -> None:
        self.method.prepare(hidden_size, layers, generator)

    def loss(self, step: Step) -> LossOutput:
        output = self.method.loss(step)
        decouple = step.cross_entropy("decouple")
        return LossOutput(output.total + self.weight * decouple, {**output.terms, "decouple": decouple})

    def state(self) -> dict[str, Tensor]:
        return self.method.state()
