"""Randomized smoothing of the forget terms."""

from __future__ import annotations

import hashlib
from typing import Annotated

import torch
from pydantic import Field

from vlm_unlearn.config import Strict
from vlm_unlearn.methods.wrappers.base import Defense, ForgetObjective, Weights, register


class RSOptions(Strict):
    sigma: Annotated[float, Field(gt=0)] = 1e-4
    """Standard deviation of the noise on each weight."""
    samples: Annotated[int, Field(gt=0, le=1000)] = 3
    """Number of perturbations per optimizer step."""


@register("rs", "Fan et al. 2025, arXiv 2502.05374; Cohen et al. 2019, arXiv 1902.02918")
class RS(Defense):
    """Trains the forget terms averaged over Gaussian noise on the weights (Fan et al. 2025, arXiv 2502.05374).

    The loss is the mean of ``l_f(w + sigma * u)`` over `samples` draws of ``u ~ N(0, I)``. The noise is a pure function
    of the run's seed, the step and the parameter's name. It is the same for all micro-batches and processes of a step.
    """

    options_type = RSOptions
    weight_copies = 2

    def forget_gradient(self, objective: ForgetObjective) -> Weights:
        options: RSOptions = self.options
        mean: Weights = {}
        for sample in range(options.samples):
            for name, value in objective.gradient(self.noise(objective, sample)).items():
                total = mean.setdefault(name, torch.zeros_like(value))
                total.add_(value, alpha=1 / options.samples)
        return mean

    def noise(self, objective: ForgetObjective, sample: int) -> Weights:
        """Returns the noise on each parameter for one sample of a step."""
        noise = {}
        for name, value in objective.parameters().items():
            key = f"{objective.seed}-{objective.step}-{sample}-{name}"
            seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1
            generator = torch.Generator(value.device).manual_seed(seed)
            drawn = torch.randn(value.shape, generator=generator, device=value.device, dtype=torch.float32)
            noise[name] = drawn.mul_(self.options.sigma).to(value.dtype)
        return noise
