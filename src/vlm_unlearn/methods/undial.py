"""Unlearning by self-distillation with adjusted logits."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from vlm_unlearn.losses import undial_loss
from vlm_unlearn.methods.base import (
    ForwardRequirements,
    LossOutput,
    Method,
    NonNegative,
    Options,
    ReferenceLogits,
    Step,
    register,
)


class UNDIALOptions(Options):
    penalty: Annotated[float, Field(gt=0)] = 10.0
    """The amount by which the reference logit of each forget token is lowered (gamma in the paper)."""
    forget_weight: NonNegative = 1.0
    """Weight of the term on forget answers."""
    retain_weight: NonNegative = 1.0
    """Weight of the cross-entropy on retain answers, 0 in the paper."""


@register("undial", "Dong et al. 2024, arXiv 2402.10052")
class UNDIAL(Method):
    """UNDIAL (Dong et al. 2024, arXiv 2402.10052): self-distillation with lowered logits of the forget tokens."""

    options_type = UNDIALOptions

    @property
    def requirements(self) -> ForwardRequirements:
        return ForwardRequirements(roles=("forget", *self.retain_roles), references=(ReferenceLogits("forget"),))

    def loss(self, step: Step) -> LossOutput:
        options: UNDIALOptions = self.options
        forget = undial_loss(
            step.logits("forget"), step.reference_logits("forget"), step.labels("forget"), options.penalty
        )
        forget = forget * step.token_weight("forget", "answer")
        return self.with_retain(step, options.forget_weight * forget, {"forget": forget})
