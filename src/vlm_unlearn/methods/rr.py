"""Representation rerouting, the loss of circuit breakers."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from vlm_unlearn.losses import rerouting_forget_loss, rerouting_retain_loss
from vlm_unlearn.methods.base import (
    LossOutput,
    Method,
    NonNegative,
    Options,
    ReferenceHidden,
    ReferenceRequirement,
    Role,
    Step,
    register,
)


class RROptions(Options):
    layers: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (9, 19)
    """Decoder layers whose outputs are turned, 0 the first."""
    alpha: Annotated[float, Field(gt=0)] = 10.0
    """Of both terms."""
    retain_weight: NonNegative = 0.0
    """Of a cross-entropy on retain answers, which the paper doesn't have."""


@register("rr", "Zou et al. 2024 (circuit breakers), arXiv 2406.04313")
class RR(Method):
    """Representation rerouting (Zou et al. 2024, arXiv 2406.04313, alg. 1).

    On harmful answers the chosen layers' hidden states are turned orthogonal to what they were; on retain text they are held. Over the run
    the weight moves from the first to the second: ``alpha * (1 - t/2T)`` and ``alpha * t/2T`` at step t of T.
    The published code counts the embeddings too: its layers 10 and 20 are 9 and 19 here.
    """

    options_type = RROptions
    layer_option = "layers"

    @property
    def reference_requirements(self) -> tuple[ReferenceRequirement, ...]:
        return (ReferenceHidden("forget"), ReferenceHidden("retain"))

    @property
    def hidden_layers(self) -> tuple[int, ...]:
        layers: tuple[int, ...] = self.options.layers
        return layers

    @property
    def truncated_forward_roles(self) -> tuple[Role, ...]:
        return ("forget",)

    def loss(self, step: Step) -> LossOutput:
        options: RROptions = self.options
        forget = self._mean(step, "forget") * step.token_weight("forget", "answer")
        retain = self._mean(step, "retain") * step.token_weight("retain", "all")
        passed = step.progress / 2
        total = options.alpha * ((1 - passed) * forget + passed * retain)
        terms = {"forget": forget, "retain_hidden": retain}
        if options.retain_weight:
            terms["retain"] = step.cross_entropy("retain")
            total = total + options.retain_weight * terms["retain"]
        return LossOutput(total, terms)

    def _mean(self, step: Step, role: Role) -> Tensor:
        """[] the role's term, averaged over the layers: on forget answers only, since the questions are asked of harmless things too."""
        term, mask = (
            (rerouting_forget_loss, step.answer_mask(role))
            if role == "forget"
            else (rerouting_retain_loss, step.attention_mask(role))
        )
        terms = [
            term(step.hidden(role, layer), step.reference_hidden(role, layer), mask) for layer in self.hidden_layers
        ]
        return torch.stack(terms).mean()
