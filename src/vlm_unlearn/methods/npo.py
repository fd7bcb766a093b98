"""Negative Preference Optimization, with Safety Mirage's retain terms."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from vlm_unlearn.losses import npo_loss, npo_retain_loss
from vlm_unlearn.methods.base import (
    LossOutput,
    Method,
    NonNegative,
    Options,
    ReferenceNLL,
    ReferenceRequirement,
    Step,
    register,
)


class NPOOptions(Options):
    beta: Annotated[float, Field(gt=0)] = 0.1
    """Inverse temperature: the larger, the sooner the push fades."""
    forget_weight: NonNegative = 1.0
    """Of the term on forget answers."""
    retain_npo_weight: NonNegative = 0.0
    """Safety Mirage's alpha_r: the mirrored term on retain answers."""
    retain_weight: NonNegative = 1.0
    """Of the cross-entropy on retain answers."""
    reduction: Literal["mean", "sum"] = "mean"
    """A sample's NLL: token mean, or sequence sum as in the NPO paper."""


@register("npo", "Zhang et al. 2024, arXiv 2404.05868; Safety Mirage, arXiv 2503.11832")
class NPO(Method):
    """Negative Preference Optimization (Zhang et al. 2024, arXiv 2404.05868, eq. 3).

    Pushes the forget answers' likelihood below the reference model's, softly: the push fades as the gap grows. With `paper`,
    Safety Mirage's difference of batch means instead of each sample's.
    """

    options_type = NPOOptions

    @property
    def reference_requirements(self) -> tuple[ReferenceRequirement, ...]:
        forget = ReferenceNLL("forget")
        return (forget, ReferenceNLL("retain")) if self.options.retain_npo_weight else (forget,)

    def loss(self, step: Step) -> LossOutput:
        options: NPOOptions = self.options
        forget = npo_loss(*self._pair(step, "forget"), options.beta)
        retain = step.cross_entropy("retain")
        total = options.forget_weight * forget + options.retain_weight * retain
        terms = {"forget": forget, "retain": retain}
        if options.retain_npo_weight:
            terms["retain_npo"] = npo_retain_loss(*self._pair(step, "retain"), options.beta)
            total = total + options.retain_npo_weight * terms["retain_npo"]
        return LossOutput(total, terms)

    def _pair(self, step: Step, role: Literal["forget", "retain"]) -> tuple[Tensor, Tensor]:
        options: NPOOptions = self.options
        if self.paper_compat:  # the published code takes the difference of batch means; see docs/published.md
            current, reference = step.batch_nll(role)
            return current[None], reference[None]
        return step.nll(role, options.reduction), step.reference_nll(role, options.reduction)
