"""Supervised safety fine-tuning of a fine-tuned model, a baseline of Safety Mirage."""

from __future__ import annotations

from vlm_unlearn.methods.base import register
from vlm_unlearn.methods.mixed_sft import MixedSFT


@register("posthoc_sft", "VLGuard (Zong et al. 2024, arXiv 2402.02207); baseline of Safety Mirage")
class PosthocSFT(MixedSFT):
    """The loss of mixed_sft as a short second stage.

    It trains a fine-tuned model on the pairs of the safety set, with few or no general pairs as the retain set.
    """
