"""Refusals next to a loss that makes answers unlikely."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from vlm_unlearn.methods.base import LossOutput, Method, NonNegative, Options, Role, Step


class RefusalOptions(Options):
    """Base of the options of methods that can train refusals next to their loss."""

    refusal_weight: NonNegative = 0.0
    """Weight of the cross-entropy on a random refusal to each forget question, as in `po`. 0 trains no refusals."""
    refusal_start: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """The fraction of the optimizer steps after which the refusals begin."""


class RefusalMethod(Method):
    """Base of methods that can train refusals next to their loss.

    A loss that makes answers unlikely leaves open what the model answers instead, which is often a broken sentence.
    `refusal_weight` adds the refusals of SafeEraser's PO (arXiv 2502.12520): ``loss + refusal_weight * CE(refusal)``,
    with the refusal that `po` would use at the same position of the stream.

    A refusal makes the harmful answer unlikely by its first word alone. What follows that word may then be hidden
    instead of removed. With `refusal_start`, the model first forgets without refusals, and learns to refuse when there
    is nothing left to hide.
    """

    options_type = RefusalOptions

    def __init__(self, options: RefusalOptions) -> None:
        super().__init__(options)
        if options.refusal_weight:
            self.preferred_answers = "refusal"  # type: ignore[misc]

    @property
    def roles(self) -> tuple[Role, ...]:
        """The roles of the loss."""
        preferred: tuple[Role, ...] = ("preferred",) if self.options.refusal_weight else ()
        return ("forget", *preferred, *self.retain_roles)

    def active_roles(self, progress: float) -> tuple[Role, ...]:
        roles = self.requirements.roles
        return tuple(role for role in roles if role != "preferred" or progress >= self.options.refusal_start)

    def with_refusals(self, step: Step, output: LossOutput) -> LossOutput:
        """Returns a loss with the term on refusals, if it has a weight at this step."""
        weight = self.options.refusal_weight
        if not weight or "preferred" not in self.active_roles(step.progress):
            return output
        refusal = step.cross_entropy("preferred")
        return LossOutput(output.total + weight * refusal, {**output.terms, "refusal": refusal})
