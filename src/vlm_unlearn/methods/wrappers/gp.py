"""Gradient penalty on the forget terms."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from vlm_unlearn.config import Strict
from vlm_unlearn.methods.wrappers.base import Defense, ForgetObjective, Weights, register, scaled_to


class GPOptions(Strict):
    weight: Annotated[float, Field(gt=0)] = 0.01
    """Weight of the norm of the gradient (rho in the published code)."""
    radius: Annotated[float, Field(gt=0)] = 0.02
    """Distance of the finite difference. With `radius` equal to `weight`, the gradient is that of `sam`."""


@register("gp", "Fan et al. 2025, arXiv 2502.05374; Zhao et al. 2022, arXiv 2202.03599")
class GP(Defense):
    """Adds the norm of the forget gradient to the loss (Fan et al. 2025, arXiv 2502.05374), so that it becomes flat.

    The penalty ``weight * |g|`` with ``g = grad l_f(w)`` has the gradient ``weight * H g / |g|``. The product with the
    Hessian ``H`` is the finite difference ``(grad l_f(w + radius * g / |g|) - g) / radius`` (Zhao et al. 2022, arXiv
    2202.03599), which needs no second derivatives. The published code adds the norm as a number without gradient.
    """

    options_type = GPOptions
    weight_copies = 2

    def forget_gradient(self, objective: ForgetObjective) -> Weights:
        options: GPOptions = self.options
        gradient = objective.gradient()
        direction = scaled_to({name: value.clone() for name, value in gradient.items()}, options.radius)
        shifted = objective.gradient(direction)
        ratio = options.weight / options.radius
        for name, value in gradient.items():
            value.add_(ratio * (shifted[name] - value))
        return gradient
