"""Representation rerouting, the loss of circuit breakers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from vlm_unlearn.losses import rerouting_forget_loss, rerouting_retain_loss
from vlm_unlearn.methods.base import (
    ForwardRequirements,
    LossOutput,
    Method,
    NonNegative,
    Options,
    ReferenceHidden,
    Role,
    Step,
    register,
)


class RROptions(Options):
    layers: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (9, 19)
    """The decoder layers whose outputs are rerouted, 0 the first."""
    alpha: Annotated[float, Field(gt=0)] = 10.0
    """Weight of both terms on hidden states."""
    retain_weight: NonNegative = 0.0
    """Weight of a cross-entropy on retain answers, which the paper does not have."""


@register("rr", "Zou et al. 2024 (circuit breakers), arXiv 2406.04313")
class RR(Method):
    """Representation rerouting (Zou et al. 2024, arXiv 2406.04313, alg. 1).

    On harmful answers, the hidden states of the selected layers become orthogonal to those of the reference model.
    On retain text, they are preserved. At step t of T, the two terms have the weights ``alpha * (1 - t/2T)`` and
    ``alpha * t/2T``. The published code also counts the embeddings as a layer: its layers 10 and 20 are 9 and 19
    here.
    """

    options_type = RROptions
    tiny_options: ClassVar[Mapping[str, Any]] = {"layers": [0, 1]}
    layer_option = "layers"

    @property
    def requirements(self) -> ForwardRequirements:
        return ForwardRequirements(
            references=(ReferenceHidden("forget"), ReferenceHidden("retain")),
            hidden_layers=self.options.layers,
            truncated_roles=("forget",),
        )

    def loss(self, step: Step) -> LossOutput:
        options: RROptions = self.options
        forget = self._mean_over_layers(step, "forget") * step.token_weight("forget", "answer")
        retain = self._mean_over_layers(step, "retain") * step.token_weight("retain", "all")
        retain_share = step.progress / 2
        total = options.alpha * ((1 - retain_share) * forget + retain_share * retain)
        terms = {"forget": forget, "retain_hidden": retain}
        if options.retain_weight:
            terms["retain"] = step.cross_entropy("retain")
            total = total + options.retain_weight * terms["retain"]
        return LossOutput(total, terms)

    def _mean_over_layers(self, step: Step, role: Role) -> Tensor:
        """Returns [], the role's term averaged over the layers.

        The forget term uses answer tokens only, since questions about harmful and harmless things are similar.
        """
        if role == "forget":
            loss, mask = rerouting_forget_loss, step.answer_mask(role)
        else:
            loss, mask = rerouting_retain_loss, step.attention_mask(role)
        terms = [
            loss(step.hidden(role, layer), step.reference_hidden(role, layer), mask) for layer in self.options.layers
        ]
        return torch.stack(terms).mean()
