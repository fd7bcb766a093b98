"""Gradient difference, one of SafeEraser's methods: gradient ascent with a retain term."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from vlm_unlearn.losses import bounded_ascent_loss
from vlm_unlearn.methods.base import ForwardRequirements, LossOutput, NonNegative, Step, register
from vlm_unlearn.methods.refusals import RefusalMethod, RefusalOptions


class GDOptions(RefusalOptions):
    forget_weight: NonNegative = 1.0
    """Weight of the negative cross-entropy on forget answers."""
    retain_weight: NonNegative = 1.0
    """Weight of the cross-entropy on retain answers."""
    max_nll: Annotated[float, Field(gt=0)] | None = None
    """Bound of the negative log-likelihood of a forget token. Tokens above it have no gradient. Null has no bound."""


@register("gd", "Liu et al. 2022, arXiv 2203.12817; SafeEraser, arXiv 2502.12520")
class GD(RefusalMethod):
    """Gradient difference: ``-CE(forget) + CE(retain)``. Gradient ascent with a retain term.

    Gradient ascent has no bound, and its model may collapse when it is trained for long. `max_nll`, which is an
    addition of this library, limits each token. `refusal_weight` adds the refusals of SafeEraser's PO (arXiv
    2502.12520) to the loss, from `refusal_start` on, as in `npo`.
    """

    options_type = GDOptions
    published_code = "safe_eraser"

    @property
    def requirements(self) -> ForwardRequirements:
        return ForwardRequirements(roles=self.roles)

    def loss(self, step: Step) -> LossOutput:
        options: GDOptions = self.options
        forget = self._forget_loss(step)
        output = self.with_retain(step, options.forget_weight * forget, {"forget": forget})
        return self.with_refusals(step, output)

    def _forget_loss(self, step: Step) -> Tensor:
        if self.options.max_nll is None:
            return -step.cross_entropy("forget")
        loss = bounded_ascent_loss(step.logits("forget"), step.labels("forget"), self.options.max_nll)
        return loss * step.token_weight("forget", "answer")
