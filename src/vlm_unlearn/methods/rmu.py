"""Representation Misdirection for Unlearning."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from vlm_unlearn.losses import rmu_forget_loss, rmu_retain_loss
from vlm_unlearn.methods.base import (
    LossOutput,
    Method,
    NonNegative,
    Options,
    ReferenceHidden,
    ReferenceRequirement,
    Role,
    Step,
    register,
)


class RMUOptions(Options):
    layer: Annotated[int, Field(ge=0)] = 7
    """Decoder layer whose output is steered, 0 the first."""
    steering_coefficient: Annotated[float, Field(gt=0)] = 10.0
    """Length of the control vector."""
    alpha: NonNegative = 1.0
    """Of the retain term on hidden states."""
    retain_weight: NonNegative = 1.0
    """Of the cross-entropy on retain answers."""


@register("rmu", "Li et al. 2024, arXiv 2403.03218; Safety Mirage, arXiv 2503.11832")
class RMU(Method):
    """RMU (Li et al. 2024, arXiv 2403.03218): misdirects hidden states on forget text, holds them on retain text.

    The control vector is one random direction in [0, 1)^H, normalised, times `steering_coefficient`, fixed for the run. Real tokens
    are steered, those of the image included; with `paper` padding too.
    """

    options_type = RMUOptions
    append_answer_to_prompt = True

    @property
    def reference_requirements(self) -> tuple[ReferenceRequirement, ...]:
        return (ReferenceHidden("retain"),) if self.options.alpha else ()

    @property
    def hidden_layers(self) -> tuple[int, ...]:
        return (self.options.layer,)

    @property
    def truncated_forward_roles(self) -> tuple[Role, ...]:
        return ("forget",)

    def prepare(self, hidden_size: int, layers: int, generator: torch.Generator) -> None:
        super().prepare(hidden_size, layers, generator)
        direction = torch.rand(hidden_size, generator=generator)
        self.control_vector: Tensor = direction / direction.norm() * self.options.steering_coefficient

    def loss(self, step: Step) -> LossOutput:
        options: RMUOptions = self.options
        hidden = step.hidden("forget", options.layer)
        # The published code averages over padding too; see docs/published.md.
        masks = {role: None if self.paper_compat else step.attention_mask(role) for role in self.roles}
        forget = rmu_forget_loss(hidden, self.control_vector.to(hidden.device), masks["forget"]) * step.token_weight(
            "forget", "all"
        )
        retain = step.cross_entropy("retain")
        total = forget + options.retain_weight * retain
        terms = {"forget": forget, "retain": retain}
        if options.alpha:
            pair = step.hidden("retain", options.layer), step.reference_hidden("retain", options.layer)
            terms["retain_hidden"] = rmu_retain_loss(*pair, masks["retain"]) * step.token_weight("retain", "all")
            total = total + options.alpha * terms["retain_hidden"]
        return LossOutput(total, terms)

    def state(self) -> dict[str, Tensor]:
        return {"control_vector": self.control_vector}
