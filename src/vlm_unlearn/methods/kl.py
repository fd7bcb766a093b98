"""Gradient ascent with a KL term, one of SafeEraser's methods."""

from __future__ import annotations

from torch import Tensor

from vlm_unlearn.losses import answer_mask, kl_loss
from vlm_unlearn.methods.base import (
    ForwardRequirements,
    LossOutput,
    Method,
    NonNegative,
    ReferenceLogits,
    Step,
    register,
)
from vlm_unlearn.methods.ga import GAOptions


class KLOptions(GAOptions):
    kl_weight: NonNegative = 1.0
    """Weight of KL(reference || current) on retain answers."""


@register("kl", "Maini et al. 2024 (TOFU), arXiv 2401.06121; SafeEraser, arXiv 2502.12520")
class KL(Method):
    """Gradient ascent with a KL term: ``-CE(forget) + KL(reference || current)``.

    The KL term is the mean over the answer tokens of the retain set. With `paper_compat`, it is the mean over all
    positions, including padding. With `full`, the batch is as long as the longest batch of the step, and a padded
    position adds 0 to the sum. Under flash attention, with which the published code runs, it does so too: its
    embedding and hence its logits are 0.
    """

    options_type = KLOptions
    published_code = "safe_eraser"

    @property
    def requirements(self) -> ForwardRequirements:
        return ForwardRequirements(
            references=(ReferenceLogits("retain"),), full_logit_roles=("retain",) if self.paper_compat else ()
        )

    def loss(self, step: Step) -> LossOutput:
        forget = -step.cross_entropy("forget")
        retain = self._divergence(step)
        total = self.options.forget_weight * forget + self.options.kl_weight * retain
        return LossOutput(total, {"forget": forget, "retain_kl": retain})

    def _divergence(self, step: Step) -> Tensor:
        """Returns [], the mean divergence on the retain batch."""
        logits, reference_logits = step.logits("retain"), step.reference_logits("retain")
        if self.reproduced_code:
            tokens = step.attention_mask("retain")
            positions = len(tokens) * step.width
            return kl_loss(logits, reference_logits, tokens) * (tokens.sum() / positions)
        # The published code averages over padding too; see docs/published.md.
        mask: Tensor | None = None if self.paper_compat else answer_mask(step.labels("retain"))
        return kl_loss(logits, reference_logits, mask) * step.token_weight("retain", "answer")
