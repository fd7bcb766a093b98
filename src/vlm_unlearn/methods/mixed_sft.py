"""Supervised safety fine-tuning, a baseline of Safety Mirage."""

from __future__ import annotations

from vlm_unlearn.methods.base import LossOutput, Method, Step, register


@register("mixed_sft", "VLGuard (Zong et al. 2024, arXiv 2402.02207); baseline of Safety Mirage")
class MixedSFT(Method):
    """Supervised fine-tuning on unsafe questions with the refusals of the data set, mixed with harmless pairs.

    The answers of the forget set must be these refusals (`data import vlguard` without ``--harmful-answers``).
    """

    unlearns = False

    def loss(self, step: Step) -> LossOutput:
        total = step.cross_entropy("forget", "retain")
        return LossOutput(
            total, {"refusal": step.cross_entropy("forget").detach(), "retain": step.cross_entropy("retain").detach()}
        )
