"""Sharpness-aware training of the forget terms."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from vlm_unlearn.config import Strict
from vlm_unlearn.methods.wrappers.base import Defense, ForgetObjective, Weights, register, scaled_to


class SAMOptions(Strict):
    rho: Annotated[float, Field(gt=0)] = 0.01
    """Norm of the perturbation of the weights."""


@register("sam", "Fan et al. 2025, arXiv 2502.05374; Foret et al. 2021, arXiv 2010.01412")
class SAM(Defense):
    """Trains the forget terms at the worst weights nearby (Fan et al. 2025, arXiv 2502.05374).

    The gradient of the forget loss ``l_f`` is ``grad l_f(w + rho * g / |g|)`` with ``g = grad l_f(w)``. Weights that
    relearning reaches within a few steps then stay unlearned too. The perturbation is computed from all micro-batches
    of an optimizer step, so that the result does not depend on how a batch is split. The published code perturbs each
    micro-batch on its own.
    """

    options_type = SAMOptions
    weight_copies = 1

    def forget_gradient(self, objective: ForgetObjective) -> Weights:
        return objective.gradient(scaled_to(objective.gradient(), self.options.rho))
