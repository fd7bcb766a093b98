"""Gradient ascent on the forget answers, alone, with a retain term, or with a tie to the reference: SafeEraser's ga, gd and kl."""

from __future__ import annotations

from torch import Tensor

from vlm_unlearn.losses import answer_mask, kl_loss
from vlm_unlearn.methods.base import (
    LossOutput,
    Method,
    NonNegative,
    Options,
    ReferenceLogits,
    ReferenceRequirement,
    Role,
    Step,
    register,
)


class GAOptions(Options):
    forget_weight: NonNegative = 1.0
    """Of the negative cross-entropy on forget answers."""


class GDOptions(GAOptions):
    retain_weight: NonNegative = 1.0
    """Of the cross-entropy on retain answers."""


class KLOptions(GAOptions):
    kl_weight: NonNegative = 1.0
    """Of KL(reference || current) on retain answers."""


@register("ga", "Jang et al. 2023, arXiv 2210.01504; SafeEraser, arXiv 2502.12520")
class GA(Method):
    """Gradient ascent: ``-CE(forget)``. Nothing holds the model together, so that it soon collapses."""

    options_type = GAOptions

    @property
    def roles(self) -> tuple[Role, ...]:
        return ("forget",)

    def loss(self, step: Step) -> LossOutput:
        forget = -step.cross_entropy("forget")
        return LossOutput(self.options.forget_weight * forget, {"forget": forget})


@register("gd", "Liu et al. 2022, arXiv 2203.12817; SafeEraser, arXiv 2502.12520")
class GD(Method):
    """Gradient difference: ``-CE(forget) + CE(retain)``."""

    options_type = GDOptions

    def loss(self, step: Step) -> LossOutput:
        forget, retain = -step.cross_entropy("forget"), step.cross_entropy("retain")
        total = self.options.forget_weight * forget + self.options.retain_weight * retain
        return LossOutput(total, {"forget": forget, "retain": retain})


@register("kl", "Maini et al. 2024 (TOFU), arXiv 2401.06121; SafeEraser, arXiv 2502.12520")
class KL(Method):
    """``-CE(forget) + KL(reference || current)`` on the retain set's answer tokens; with `paper` on every position, padding included."""

    options_type = KLOptions

    @property
    def reference_requirements(self) -> tuple[ReferenceRequirement, ...]:
        return (ReferenceLogits("retain"),)

    @property
    def full_logit_roles(self) -> tuple[Role, ...]:
        return ("retain",) if self.paper_compat else ()

    def loss(self, step: Step) -> LossOutput:
        forget = -step.cross_entropy("forget")
        # The published code averages over padding too; see docs/published.md.
        mask: Tensor | None = None if self.paper_compat else answer_mask(step.labels("retain"))
        retain = kl_loss(step.logits("retain"), step.reference_logits("retain"), mask) * step.token_weight(
            "retain", "answer"
        )
        total = self.options.forget_weight * forget + self.options.kl_weight * retain
        return LossOutput(total, {"forget": forget, "retain_kl": retain})
