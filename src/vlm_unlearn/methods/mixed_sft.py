"""Supervised safety fine-tuning: the baselines that create the safety mirage."""

from __future__ import annotations

from vlm_unlearn.methods.base import LossOutput, Method, Step, register


@register("mixed_sft", "VLGuard (Zong et al. 2024, arXiv 2402.02207); baseline of Safety Mirage")
class MixedSFT(Method):
    """Supervised fine-tuning on unsafe questions with their reference refusals, mixed with harmless pairs.

    The forget set must hold the refusals that the data set gives (`data import vlguard` without harmful answers).
    """

    unlearns = False

    def loss(self, step: Step) -> LossOutput:
        total = step.cross_entropy("forget", "retain")
        return LossOutput(
            total, {"refusal": step.cross_entropy("forget").detach(), "retain": step.cross_entropy("retain").detach()}
        )


@register("posthoc_sft", "VLGuard (Zong et al. 2024, arXiv 2402.02207); baseline of Safety Mirage")
class PosthocSFT(MixedSFT):
    """The loss of mixed_sft as a short second stage: a finished model, the safety set's own pairs and few or no general ones to retain."""
