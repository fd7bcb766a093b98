"""DPO with refusals as the preferred answers."""

from __future__ import annotations

from vlm_unlearn.methods.base import register
from vlm_unlearn.methods.dpo import DPO


@register("idk_dpo", "Zhang et al. 2024, arXiv 2404.05868; Maini et al. 2024 (TOFU), arXiv 2401.06121")
class IdkDPO(DPO):
    """DPO with a random refusal as the preferred answer."""

    preferred_answers = "refusal"
