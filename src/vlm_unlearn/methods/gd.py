"""Gradient difference, one of SafeEraser's methods: gradient ascent with a retain term."""

from __future__ import annotations

from vlm_unlearn.methods.base import LossOutput, Method, NonNegative, Step, register
from vlm_unlearn.methods.ga import GAOptions


class GDOptions(GAOptions):
    retain_weight: NonNegative = 1.0
    """Weight of the cross-entropy on retain answers."""


@register("gd", "Liu et al. 2022, arXiv 2203.12817; SafeEraser, arXiv 2502.12520")
class GD(Method):
    """Gradient difference: ``-CE(forget) + CE(retain)``."""

    options_type = GDOptions
    published_code = "safe_eraser"

    def loss(self, step: Step) -> LossOutput:
        forget, retain = -step.cross_entropy("forget"), step.cross_entropy("retain")
        total = self.options.forget_weight * forget + self.options.retain_weight * retain
        return LossOutput(total, {"forget": forget, "retain": retain})
