"""Unlearning by self-distillation with adjusted logits."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from vlm_unlearn.losses import undial_loss
from vlm_unlearn.methods.base import (
    LossOutput,
    Method,
    NonNegative,
    Options,
    ReferenceLogits,
    ReferenceRequirement,
    Step,
    register,
)


class UNDIALOptions(Options):
    penalty: Annotated[float, Field(gt=0)] = 10.0
    """Taken off the logit of each forget token."""
    forget_weight: NonNegative = 1.0
    """Of the term on forget answers."""
    retain_weight: NonNegative = 1.0
    """Of the cross-entropy on retain answers; 0 in the paper."""


@register("undial", "Dong et al. 2024, arXiv 2402.10052")
class UNDIAL(Method):
    """UNDIAL (Dong et al. 2024, arXiv 2402.10052): distils the reference model with the forget tokens' own logits lowered."""

    options_type = UNDIALOptions

    @property
    def reference_requirements(self) -> tuple[ReferenceRequirement, ...]:
        return (ReferenceLogits("forget"),)

    def loss(self, step: Step) -> LossOutput:
        options: UNDIALOptions = self.options
        forget = undial_loss(
            step.logits("forget"), step.reference_logits("forget"), step.labels("forget"), options.penalty
        )
        forget = forget * step.token_weight("forget", "answer")
        retain = step.cross_entropy("retain")
        return LossOutput(
            options.forget_weight * forget + options.retain_weight * retain, {"forget": forget, "retain": retain}
        )
