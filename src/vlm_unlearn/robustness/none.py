"""No attack: the rates that all attacks are compared with."""

from __future__ import annotations

from collections.abc import Iterator

from vlm_unlearn.robustness.base import AttackedState, AttackTarget, ModelAttack, register


@register("none")
class NoAttack(ModelAttack):
    """Asks the questions as they are."""

    def run(self, target: AttackTarget) -> Iterator[AttackedState]:
        """Yields the model as it is."""
        yield AttackedState("none")
