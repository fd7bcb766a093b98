"""Gradient ascent on the forget answers, one of SafeEraser's methods."""

from __future__ import annotations

from vlm_unlearn.methods.base import ForwardRequirements, LossOutput, Method, NonNegative, Options, Step, register


class GAOptions(Options):
    forget_weight: NonNegative = 1.0
    """Weight of the negative cross-entropy on forget answers."""


@register("ga", "Jang et al. 2023, arXiv 2210.01504; SafeEraser, arXiv 2502.12520")
class GA(Method):
    """Gradient ascent: ``-CE(forget)``. Without a retain term, the model soon collapses."""

    options_type = GAOptions
    published_code = "safe_eraser"

    @property
    def requirements(self) -> ForwardRequirements:
        return ForwardRequirements(roles=("forget",))

    def loss(self, step: Step) -> LossOutput:
        forget = -step.cross_entropy("forget")
        return LossOutput(self.options.forget_weight * forget, {"forget": forget})
