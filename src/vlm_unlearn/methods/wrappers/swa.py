"""Weight averaging."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from vlm_unlearn.config import Strict
from vlm_unlearn.errors import UserError
from vlm_unlearn.methods.base import Method
from vlm_unlearn.methods.wrappers.base import Defense, register


class SWAOptions(Strict):
    start_step: Annotated[int, Field(gt=0)] | None = None
    """The first optimizer step whose weights are averaged. Null starts at 80 % of the steps, as published."""
    interval: Annotated[int, Field(gt=0)] = 5
    """Number of optimizer steps between two averaged weights."""


PUBLISHED_START = 0.8  # step 100 of 125


@register("swa", "Fan et al. 2025, arXiv 2502.05374; Izmailov et al. 2018, arXiv 1803.05407")
class SWA(Defense):
    """Saves the mean of the weights of several steps (Fan et al. 2025, arXiv 2502.05374).

    The trained model has the mean ``(w_1 + ... + w_n) / n`` of the weights after step `start_step` and every `interval`
    steps from there, which lies in a flatter region than each of them. Training itself does not change. A run that a
    probe stops before `start_step` keeps its last weights.
    """

    options_type = SWAOptions
    weight_copies = 1

    def __init__(self, options: SWAOptions | None = None) -> None:
        super().__init__(options)
        self._start_step = self.options.start_step or 1
        self._count = 0
        self._mean: dict[str, Tensor] = {}  # in float32 or the parameters' higher precision

    def prepare(self, method: Method, layers: int, steps: int) -> None:
        self._start_step = self.options.start_step or max(1, math.ceil(PUBLISHED_START * steps))
        if self._start_step > steps:
            raise UserError(
                f"{self._start_step} is after the last step. The run has {steps} optimizer steps.",
                code="out-of-range",
                field="defense.start_step",
            )

    def after_step(self, weights: Mapping[str, Tensor], step: int) -> None:
        if step < self._start_step or (step - self._start_step) % self.options.interval:
            return
        self._count += 1
        for name, value in weights.items():
            current = value.detach().to(torch.promote_types(value.dtype, torch.float32))
            if self._count == 1:
                self._mean[name] = current.clone()
            else:
                self._mean[name] += (current - self._mean[name]) / self._count

    def final_weights(self) -> Mapping[str, Tensor] | None:
        return self._mean if self._count else None

    def state(self) -> dict[str, Tensor]:
        return {"count": torch.tensor(self._count), **{f"mean.{name}": value for name, value in self._mean.items()}}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._count = int(state["count"])
        prefix = "mean."
        self._mean = {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
