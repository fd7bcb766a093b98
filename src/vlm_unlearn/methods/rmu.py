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
    image. With `paper_compat`, padding is steered too. With `full`, its hidden states are 0, as under flash attention
    in the published code, and the term on hidden states has retain examples of its own.
    """

    options_type = RMUOptions
    published_code = "safety_mirage"
    tiny_options: ClassVar[Mapping[str, Any]] = {"layer": 0}
    append_answer_to_prompt = True

    @property
    def requirements(self) -> ForwardRequirements:
        role = self.reference_retain_role
        second_batch = (role,) if self.options.alpha and role != "retain" else ()
        return ForwardRequirements(
            roles=("forget", "retain", *second_batch),
            references=(ReferenceHidden(role),) if self.options.alpha else (),
            hidden_layers=(self.options.layer,),
            truncated_roles=("forget", *second_batch),
        )

    def prepare(self, hidden_size: int, layers: int, generator: torch.Generator) -> None:
        super().prepare(hidden_size, layers, generator)
        direction = torch.rand(hidden_size, generator=generator)
        self.control_vector: Tensor = direction / direction.norm() * self.options.steering_coefficient

    def loss(self, step: Step) -> LossOutput:
        options: RMUOptions = self.options
        hidden, mask = self._hidden(step, "forget")
        forget = rmu_forget_loss(hidden, self.control_vector.to(hidden.device), mask)
        forget = forget * step.token_weight("forget", "all")
        retain = step.cross_entropy("retain")
        total = forget + options.retain_weight * retain
        terms = {"forget": forget, "retain": retain}
        if options.alpha:
            role = self.reference_retain_role
            retain_hidden, mask = self._hidden(step, role)
            reference = step.reference_hidden(role, options.layer)
            if self.reproduced_code:
                reference = reference * step.attention_mask(role)[..., None]
            term = rmu_retain_loss(retain_hidden, reference, mask)
            terms["retain_hidden"] = term * step.token_weight(role, "all")
            total = total + options.alpha * terms["retain_hidden"]
        return LossOutput(total, terms)

    def _hidden(self, step: Step, role: Role) -> tuple[Tensor, Tensor | None]:
        """Returns the hidden states [B, S, H] of a role, and the positions [B, S] to average over, None for all.

        The published code also averages over padding. See docs/published.md.
        """
        hidden, tokens = step.hidden(role, self.options.layer), step.attention_mask(role)
        if self.reproduced_code:
            return hidden * tokens[..., None], None
        return hidden, None if self.paper_compat else tokens

    def state(self) -> dict[str, Tensor]:
        return {"control_vector": self.control_vector}
