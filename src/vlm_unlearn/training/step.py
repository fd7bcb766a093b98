"""The values of a training step that a method's loss can request.

A method's loss receives a `ModelStep` and requests values from it, for example ``step.nll("forget")``. Likelihoods,
logits and hidden states are read from the outputs of the forward passes (`Passes`), which run at the first request.
Masks and token weights need no pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from vlm_unlearn.data.encoding import Batch
from vlm_unlearn.losses import IGNORED, answer_mask
from vlm_unlearn.methods import Role, TokenKind
from vlm_unlearn.modeling.forward import ForwardOutput
from vlm_unlearn.training.passes import Passes

Reduction = Literal["mean", "sum"]


def count_tokens(batches: Mapping[Role, Batch]) -> dict[tuple[Role, TokenKind], int]:
    """Returns the number of tokens of each role's batch, by role and kind."""
    kinds: tuple[TokenKind, ...] = get_args(TokenKind)
    return {(role, kind): int(_token_count(batch, kind)) for role, batch in batches.items() for kind in kinds}


def _token_count(batch: Batch, kind: TokenKind) -> Tensor:
    """Returns the number of tokens of one kind as a scalar tensor."""
    if kind == "all":
        return batch["attention_mask"].sum()
    # Token 0 is never predicted. A batch whose answer is part of its prompt (RMU) has no labels.
    return (batch["labels"][:, 1:] != IGNORED).sum() if "labels" in batch else torch.tensor(0)


class ModelStep:
    """Implements `vlm_unlearn.methods.Step` for one micro-batch.

    Args:
        passes: The forward passes, which may compute other micro-batches too.
        micro_batch: The number of the micro-batch in the passes.
        token_totals: The denominators of means over tokens, by role and kind: the tokens of the entire optimizer
            step, divided by its number of micro-batches in all processes. The Trainer averages over the micro-batches
            of a process, and DDP over processes, so that every token of the step has the same weight. None (with
            `paper_compat`) takes the tokens of the micro-batch, so that every micro-batch has the same weight.
        progress: Fraction of the run's optimizer steps that are complete, 0 at the first step.
    """

    def __init__(
        self,
        passes: Passes,
        micro_batch: int = 0,
        token_totals: Mapping[tuple[Role, TokenKind], float] | None = None,
        progress: float = 0.0,
    ) -> None:
        batches = passes.micro_batches[micro_batch]
        self.progress = progress
        self.width = max((batch["input_ids"].shape[1] for batch in batches.values()), default=0)
        self.passes = passes
        self._micro_batch = micro_batch
        self._batches = batches
        self._token_totals: Mapping[tuple[Role, TokenKind], float] = (
            count_tokens(batches) if token_totals is None else token_totals
        )

    def _current_output(self, role: Role) -> ForwardOutput:
        return self.passes.current((self._micro_batch, role))

    def _reference_states(self, role: Role) -> ForwardOutput:
        """Returns the reference model's output for a role, which is not cached."""
        output = self.passes.reference((self._micro_batch, role))
        assert isinstance(output, ForwardOutput), "only likelihoods are cached"
        return output

    # Values for the loss, documented in `vlm_unlearn.methods.Step`

    def nll(self, role: Role, reduction: Reduction = "mean") -> Tensor:
        return _reduce(self._current_output(role).answer_nll, reduction)

    def reference_nll(self, role: Role, reduction: Reduction = "mean") -> Tensor:
        return _reduce(self.passes.reference((self._micro_batch, role)).answer_nll, reduction)

    def cross_entropy(self, *roles: Role) -> Tensor:
        total = torch.stack([self._current_output(role).answer_nll[0].sum() for role in roles]).sum()
        return total / sum(self._token_totals[role, "answer"] for role in roles)

    def micro_batch_nll(self, role: Role) -> tuple[Tensor, Tensor]:
        # Unlike `cross_entropy`, a mean over this micro-batch (`paper_compat`). Both models predict the same tokens.
        nll_sum, tokens = self._current_output(role).answer_nll
        reference_sum, _ = self.passes.reference((self._micro_batch, role)).answer_nll
        return nll_sum.sum() / tokens.sum(), reference_sum.sum() / tokens.sum()

    def logits(self, role: Role) -> Tensor:
        return self._current_output(role).padded_logits()

    def reference_logits(self, role: Role) -> Tensor:
        return self._reference_states(role).padded_logits()

    def labels(self, role: Role) -> Tensor:
        # The columns of `padded_logits`: from the first with logits to one past the last, so that the labels can be
        # shifted.
        return self._batches[role]["labels"][:, self._current_output(role).columns]

    def hidden(self, role: Role, layer: int) -> Tensor:
        return self._current_output(role).hidden[layer]

    def reference_hidden(self, role: Role, layer: int) -> Tensor:
        return self._reference_states(role).hidden[layer]

    def attention_mask(self, role: Role) -> Tensor:
        return self._batches[role]["attention_mask"]

    def answer_mask(self, role: Role) -> Tensor:
        return answer_mask(self._batches[role]["labels"])

    def token_weight(self, role: Role, kind: TokenKind) -> Tensor:
        return _token_count(self._batches[role], kind) / self._token_totals[role, kind]

    def zero_loss_over_all_logits(self) -> Tensor:
        """Returns a scalar 0 that depends on every computed logit, for methods that use hidden states.

        A loss on hidden states alone leaves the upper layers out of the graph, and DDP would hang waiting for their
        gradients.
        """
        return torch.stack([0.0 * self._current_output(role).logits.float().sum() for role in self._batches]).sum()


def _reduce(answer_nll: tuple[Tensor, Tensor], reduction: Reduction) -> Tensor:
    """Returns [B], each sample's answer NLL as a token mean or a sequence sum."""
    nll_sum, tokens = answer_nll
    return nll_sum / tokens if reduction == "mean" else nll_sum
