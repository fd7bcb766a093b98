"""Negative Preference Optimization, with Safety Mirage's retain terms."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from vlm_unlearn.losses import npo_loss, npo_retain_loss
from vlm_unlearn.methods.base import (
    ForwardRequirements,
    LossOutput,
    NonNegative,
    ReferenceNLL,
    Role,
    Step,
    register,
)
from vlm_unlearn.methods.refusals import RefusalMethod, RefusalOptions


class NPOOptions(RefusalOptions):
    beta: Annotated[float, Field(gt=0)] = 0.1
    """Inverse temperature. With a larger value, the gradient vanishes at a smaller gap to the reference model."""
    forget_weight: NonNegative = 1.0
    """Weight of the term on forget answers."""
    retain_npo_weight: NonNegative = 0.0
    """Weight of the mirrored NPO term on retain answers (alpha_r in Safety Mirage)."""
    retain_weight: NonNegative = 1.0
    """Weight of the cross-entropy on retain answers."""
    reduction: Literal["mean", "sum"] = "mean"
    """How the NLL of a sample is computed: token mean, or sequence sum as in the NPO paper."""


@register(
    "npo",
    "Zhang et al. 2024, arXiv 2404.05868; Safety Mirage, arXiv 2503.11832; refusal_weight: SafeEraser's PO, "
    "arXiv 2502.12520",
)
class NPO(RefusalMethod):
    """Negative Preference Optimization (Zhang et al. 2024, arXiv 2404.05868, eq. 3).

    Pushes the likelihood of the forget answers below that under the reference model. The gradient vanishes as the
    gap grows. With `paper_compat`, the loss uses the difference of batch means, as in Safety Mirage's code, instead
    of one difference per sample. With `full`, the mirrored term has retain examples of its own.

    NPO alone leaves open what the model answers instead, which is often a broken sentence. `refusal_weight` adds the
    refusals of SafeEraser's PO (arXiv 2502.12520): the loss is ``npo + refusal_weight * CE(refusal)``, with the refusal
    that `po` would use at the same position of the stream. `simnpo` and `gd` have the same option.
    """

    options_type = NPOOptions
    published_code = "safety_mirage"

    @property
    def requirements(self) -> ForwardRequirements:
        if not self.options.retain_npo_weight:
            return ForwardRequirements(roles=self.roles, references=(ReferenceNLL("forget"),))
        role = self.reference_retain_role
        roles = self.roles if role in self.roles else (*self.roles, role)
        return ForwardRequirements(roles=roles, references=(ReferenceNLL("forget"), ReferenceNLL(role)))

    def loss(self, step: Step) -> LossOutput:
        options: NPOOptions = self.options
        forget = npo_loss(*self._current_and_reference_nll(step, "forget"), options.beta)
        output = self.with_retain(step, options.forget_weight * forget, {"forget": forget})
        if options.retain_npo_weight:
            nll = self._current_and_reference_nll(step, self.reference_retain_role)
            retain = npo_retain_loss(*nll, options.beta)
            total = output.total + options.retain_npo_weight * retain
            output = LossOutput(total, {**output.terms, "retain_npo": retain})
        return self.with_refusals(step, output)

    def _current_and_reference_nll(self, step: Step, role: Role) -> tuple[Tensor, Tensor]:
        options: NPOOptions = self.options
        if self.paper_compat:  # see docs/published.md
            current, reference = step.micro_batch_nll(role)
            return current[None], reference[None]
        return step.nll(role, options.reduction), step.reference_nll(role, options.reduction)
