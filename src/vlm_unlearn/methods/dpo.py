"""Direct Preference Optimization of a harmless answer over a harmful one."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from vlm_unlearn.losses import dpo_loss
from vlm_unlearn.methods.base import (
    ForwardRequirements,
    LossOutput,
    Method,
    NonNegative,
    Options,
    ReferenceNLL,
    Step,
    register,
)


class DPOOptions(Options):
    beta: Annotated[float, Field(gt=0)] = 0.1
    """Inverse temperature of the preference."""
    forget_weight: NonNegative = 1.0
    """Weight of the preference term."""
    retain_weight: NonNegative = 1.0
    """Weight of the cross-entropy on retain answers."""
    reduction: Literal["mean", "sum"] = "sum"
    """How the NLL of an answer is computed: sequence sum as in the paper, or token mean."""


@register("dpo", "Rafailov et al. 2023, arXiv 2305.18290")
class DPO(Method):
    """DPO (Rafailov et al. 2023, arXiv 2305.18290, eq. 7) with a retain term.

    The forget answer is rejected. The answer to the same question in the training set's ``preferred.jsonl`` is
    preferred.
    """

    options_type = DPOOptions
    preferred_answers: ClassVar[Literal["refusal", "data"] | None] = "data"

    @property
    def requirements(self) -> ForwardRequirements:
        return ForwardRequirements(
            roles=("forget", "preferred", *self.retain_roles),
            references=(ReferenceNLL("forget"), ReferenceNLL("preferred")),
        )

    def loss(self, step: Step) -> LossOutput:
        options: DPOOptions = self.options
        preferred, rejected = step.nll("preferred", options.reduction), step.nll("forget", options.reduction)
        preferred_reference = step.reference_nll("preferred", options.reduction)
        rejected_reference = step.reference_nll("forget", options.reduction)
        preference = dpo_loss(preferred, rejected, preferred_reference, rejected_reference, options.beta)
        return self.with_retain(step, options.forget_weight * preference, {"forget": preference})
