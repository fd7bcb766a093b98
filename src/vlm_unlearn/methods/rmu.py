"""Representation Misdirection for Unlearning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from vlm_unlearn.losses import rmu_forget_loss, rmu_retain_loss
from vlm_unlearn.methods.base import (
    ForwardRequirements,
    LossOutput,
    Method,
    NonNegative,
    Options,
    ReferenceHidden,
    Role,
    Step,
    register,
)


class RMUOptions(Options):
    layer: Annotated[int, Field(ge=0)] = 7
    """The decoder layer whose output is steered, 0 the first."""
    steering_coefficient: Annotated[float, Field(gt=0)] = 10.0
    """Norm of the control vector."""
    alpha: NonNegative = 1.0
    """Weight of the retain term on hidden states."""
    retain_weight: NonNegative = 1.0
    """Weight of the cross-entropy on retain answers."""


@register("rmu", "Li et al. 2024, arXiv 2403.03218; Safety Mirage, arXiv 2503.11832")
class RMU(Method):
    """RMU (Li et al. 2024, arXiv 2403.03218): steers hidden states on forget text and preserves them on retain text.

    On forget text, the hidden states of one layer move to a control vector: a random direction in [0, 1)^H,
    normalized, times `steering_coefficient`, fixed for the run. All tokens are steered, including those of the
    image. With `paper_compat`, padding is steered too.
    """

    options_type = RMUOptions
    tiny_options: ClassVar[Mapping[str, Any]] = {"layer": 0}
    append_answer_to_prompt = True

    @property
    def requirements(self) -> ForwardRequirements:
        return ForwardRequirements(
            references=(ReferenceHidden("retain"),) if self.options.alpha else (),
            hidden_layers=(self.options.layer,),
            truncated_roles=("forget",),
        )

    def prepare(self, hidden_size: int, layers: int, generator: torch.Generator) -> None:
        super().prepare(hidden_size, layers, generator)
        direction = torch.rand(hidden_size, generator=generator)
        self.control_vector: Tensor = direction / direction.norm() * self.options.steering_coefficient

    def loss(self, step: Step) -> LossOutput:
        options: RMUOptions = self.options
        hidden = step.hidden("forget", options.layer)
        # The published code also averages over padding. See docs/published.md.
        roles: tuple[Role, ...] = ("forget", "retain")
        masks = {role: None if self.paper_compat else step.attention_mask(role) for role in roles}
        forget = rmu_forget_loss(hidden, self.control_vector.to(hidden.device), masks["forget"])
        forget = forget * step.token_weight("forget", "all")
        retain = step.cross_entropy("retain")
        total = forget + options.retain_weight * retain
        terms = {"forget": forget, "retain": retain}
        if options.alpha:
            retain_hidden, reference = (
                step.hidden("retain", options.layer),
                step.reference_hidden("retain", options.layer),
            )
            term = rmu_retain_loss(retain_hidden, reference, masks["retain"])
            terms["retain_hidden"] = term * step.token_weight("retain", "all")
            total = total + options.alpha * terms["retain_hidden"]
        return LossOutput(total, terms)

    def state(self) -> dict[str, Tensor]:
        return {"control_vector": self.control_vector}
