"""A defense: the mean of the gradients at the weights and at the worst weights nearby."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from vlm_unlearn.config import Strict
from vlm_unlearn.methods.wrappers.base import Defense, ForgetObjective, Weights, scaled_to


class HalfSAMOptions(Strict):
    """The options of half_sam."""

    rho: Annotated[float, Field(gt=0)] = 0.01
    """Norm of the perturbation of the weights."""


class HalfSAM(Defense):
    """Averages the gradients of the forget terms at the weights and at those of SAM."""

    source = "an example; no paper"
    options_type = HalfSAMOptions

    def forget_gradient(self, objective: ForgetObjective) -> Weights:
        """Returns the mean of two gradients."""
        gradient = objective.gradient()
        ascent = scaled_to({name: value.clone() for name, value in gradient.items()}, self.options.rho)
        shifted = objective.gradient(ascent)
        return {name: (value + shifted[name]) / 2 for name, value in gradient.items()}
