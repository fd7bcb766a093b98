"""A method: gradient ascent that stops at a bound."""

from __future__ import annotations

from typing import Annotated

import torch.nn.functional as F
from pydantic import Field

from vlm_unlearn.methods.base import LossOutput, Method, NonNegative, Options, Step


class CappedGAOptions(Options):
    """The options of capped_ga."""

    bound: Annotated[float, Field(gt=0)] = 5.0
    """Bound in nats per token. Less likely answers add no loss."""
    retain_weight: NonNegative = 1.0
    """Weight of the cross-entropy on retain answers."""


class CappedGA(Method):
    """Gradient ascent on the forget answers down to a bound of their likelihood."""

    source = "an example; no paper"
    options_type = CappedGAOptions

    def loss(self, step: Step) -> LossOutput:
        """Returns ``mean(relu(bound - nll(forget))) + retain_weight * CE(retain)``."""
        forget = F.relu(self.options.bound - step.nll("forget")).mean()
        retain = step.cross_entropy("retain")
        return LossOutput(forget + self.options.retain_weight * retain, {"forget": forget, "retain": retain})
