"""Preference Optimization in SafeEraser's sense: supervised training to refuse the forget questions."""

from __future__ import annotations

from vlm_unlearn.methods.base import register
from vlm_unlearn.methods.mixed_sft import MixedSFT


@register("po", "SafeEraser, arXiv 2502.12520 (idk in its code)")
class PO(MixedSFT):
    """Cross-entropy on the forget questions with random refusals as answers, and on the retain set, as one batch."""

    forget_target = "refusal"
    published_code = "safe_eraser"
