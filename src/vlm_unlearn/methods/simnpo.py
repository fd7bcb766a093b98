"""Simple Negative Preference Optimization: NPO without a reference model."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from vlm_unlearn.losses import simnpo_loss
from vlm_unlearn.methods.base import ForwardRequirements, LossOutput, NonNegative, Step, register
from vlm_unlearn.methods.refusals import RefusalMethod, RefusalOptions


class SimNPOOptions(RefusalOptions):
    beta: Annotated[float, Field(gt=0)] = 2.5
    """Inverse temperature of the forget term."""
    gamma: NonNegative = 0.0
    """Margin inside the sigmoid, 0 in most of the paper's runs."""
    forget_weight: NonNegative = 1.0
    """Weight of the term on forget answers."""
    retain_weight: NonNegative = 1.0
    """Weight of the cross-entropy on retain answers."""


@register("simnpo", "Fan et al. 2024, arXiv 2410.07163; refusal_weight: SafeEraser's PO, arXiv 2502.12520")
class SimNPO(RefusalMethod):
    """SimNPO (Fan et al. 2024, arXiv 2410.07163, eq. 6): NPO on token means, without a reference model.

    `refusal_weight` adds the refusals of SafeEraser's PO (arXiv 2502.12520) to the loss, as in `npo`.
    """

    options_type = SimNPOOptions

    @property
    def requirements(self) -> ForwardRequirements:
        return ForwardRequirements(roles=self.roles)

    def loss(self, step: Step) -> LossOutput:
        options: SimNPOOptions = self.options
        forget = simnpo_loss(step.nll("forget"), options.beta, options.gamma)
        output = self.with_retain(step, options.forget_weight * forget, {"forget": forget})
        return self.with_refusals(step, output)
