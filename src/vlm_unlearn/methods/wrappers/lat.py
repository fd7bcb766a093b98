"""Latent adversarial training of the forget terms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from vlm_unlearn.config import Strict
from vlm_unlearn.errors import UserError
from vlm_unlearn.methods.base import Method
from vlm_unlearn.methods.wrappers.base import Defense, LatentObjective, register


class LATOptions(Strict):
    layers: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (8, 16, 24, 30)
    """The decoder layers whose outputs are perturbed, 0 the first."""
    epsilon: Annotated[float, Field(gt=0)] = 2.0
    """Maximum Euclidean norm of the perturbation at each position."""
    steps: Annotated[int, Field(gt=0, le=1000)] = 8
    """Number of steps of the inner attack (PGD)."""
    step_size: Annotated[float, Field(gt=0)] | None = None
    """Length of an inner step at each position. Null takes ``2.5 * epsilon / steps``."""


@register("lat", "Sheshadri et al. 2024, arXiv 2407.15549; Casper et al. 2024, arXiv 2403.05030")
class LAT(Defense):
    """Trains the forget terms under an attack on the hidden states (Sheshadri et al. 2024, arXiv 2407.15549).

    For each micro-batch, projected gradient descent (PGD) finds perturbations of the residual stream after some
    decoder layers that increase the forget loss, which brings the harmful answers back. The step then trains the
    forget terms under these perturbations. They act on the positions of question and image, with at most norm
    `epsilon` each. The published code uses AdamW for the inner steps, which a plain PGD replaces here.
    """

    options_type = LATOptions
    tiny_options: ClassVar[Mapping[str, Any]] = {"layers": [0, 1], "epsilon": 0.5}

    def prepare(self, method: Method, layers: int, steps: int) -> None:
        options: LATOptions = self.options
        outside = [layer for layer in options.layers if layer >= layers]
        if outside:
            raise UserError(
                f"{outside[0]} is out of range. The model has decoder layers 0 to {layers - 1}.",
                code="out-of-range",
                field="defense.layers",
            )
        requirements = method.requirements
        if "forget" in requirements.truncated_roles and min(options.layers) > max(requirements.hidden_layers):
            raise UserError(
                f"{min(options.layers)} has no effect: the forget loss uses no layer above "
                f"{max(requirements.hidden_layers)}.",
                code="conflicting-settings",
                field="defense.layers",
            )

    def latent_shifts(self, objective: LatentObjective) -> Mapping[int, Tensor]:
        options: LATOptions = self.options
        step_size = options.step_size or 2.5 * options.epsilon / options.steps
        shifts = objective.zeros(sorted(set(options.layers)))
        mask = objective.mask()[..., None]
        for _ in range(options.steps):
            for layer, gradient in objective.gradient(shifts).items():
                length = torch.linalg.vector_norm(gradient, dim=-1, keepdim=True)
                shift = shifts[layer] + step_size * mask * gradient / length.clamp(min=1e-12)
                size = torch.linalg.vector_norm(shift, dim=-1, keepdim=True)
                shifts[layer] = shift * (options.epsilon / size.clamp(min=options.epsilon))
        return shifts
