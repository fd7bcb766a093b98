"""One forward pass of a batch: logits at the positions that a loss uses, and the hidden states of selected layers.

Questions on one image can share its tokens (see `packing`), and no logits are computed for positions that no loss uses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm_unlearn.data.encoding import Batch
from vlm_unlearn.losses import IGNORED, answer_mask
from vlm_unlearn.modeling.batch_merge import NON_MODEL_KEYS
from vlm_unlearn.modeling.packing import Packing, packed_inputs
from vlm_unlearn.modeling.vlm import VisionLanguageModel

CHUNK = 1024  # number of positions whose logits are held in float32 at a time


@dataclass(frozen=True)
class ForwardOutput:
    """The output of one forward pass over a batch of B samples and S positions, with vocabulary V and hidden size H."""

    logit_mask: Tensor  # [B, S] bool, the positions whose logits were computed
    logits: Tensor  # [N, V] at the N positions of `logit_mask`, row by row
    labels: Tensor  # [B, S], unshifted, -100 where ignored
    hidden: Mapping[int, Tensor]  # [B, S, H] by decoder layer

    @cached_property
    def answer_nll(self) -> tuple[Tensor, Tensor]:
        """The answers' negative log-likelihood, ``(nll_sum [B], tokens [B])`` as in `losses.answer_nll`."""
        mask = answer_mask(self.labels)
        targets = self.labels.roll(-1, dims=1).masked_fill(~mask, IGNORED)[self.logit_mask]
        nll: Tensor = _TokenNLL.apply(self.logits, targets)  # type: ignore[no-untyped-call]
        # Unlike index_add, segment_reduce adds in the same order every time on a GPU too.
        return torch.segment_reduce(nll, "sum", lengths=self.logit_mask.sum(dim=1), unsafe=True), mask.sum(dim=1)

    @cached_property
    def columns(self) -> Tensor:
        """The columns [K] of `padded_logits`: from the first position with logits in any row to one past the last."""
        positions = self.logit_mask.any(dim=0).nonzero()
        first = last = 0
        if len(positions):
            first, last = int(positions.min()), min(int(positions.max()) + 1, self.logit_mask.shape[1] - 1)
        return torch.arange(first, last + 1, device=self.logit_mask.device)

    def padded_logits(self) -> Tensor:
        """Returns the logits at `columns` as [B, K, V], zeros at positions whose logits were not computed."""
        mask = self.logit_mask[:, self.columns]
        return self.logits.new_zeros(*mask.shape, self.logits.shape[-1]).index_put((mask,), self.logits)

    def split(self, batch_shapes: Sequence[tuple[int, int]]) -> list[ForwardOutput]:
        """Splits the output of a merged batch into the outputs of its batches.

        Args:
            batch_shapes: The number of rows and positions of each batch, in the order in which they were merged.
        """
        rows = [count for count, _ in batch_shapes]
        masks, labels = torch.split(self.logit_mask, rows), torch.split(self.labels, rows)
        logits = torch.split(self.logits, torch.stack([mask.sum() for mask in masks]).tolist())
        hidden = {layer: torch.split(states, rows) for layer, states in self.hidden.items()}
        return [
            ForwardOutput(
                masks[index][:, :width],
                logits[index],
                labels[index][:, :width],
                {layer: states[index][:, :width] for layer, states in hidden.items()},
            )
            for index, (_, width) in enumerate(batch_shapes)
        ]


class _TokenNLL(torch.autograd.Function):
    """Computes float32 negative log-likelihoods [N] of targets [N], 0 where ignored, from logits [N, V].

    Saves nothing of the vocabulary's size for the backward pass except the logits, and makes float32 copies of only
    `CHUNK` rows at a time. PyTorch's cross-entropy keeps one such copy of all rows and allocates another for its
    gradient.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(logits, targets)
        chunks = zip(torch.split(logits, CHUNK), torch.split(targets, CHUNK), strict=True)
        return torch.cat(
            [F.cross_entropy(chunk.float(), target, ignore_index=IGNORED, reduction="none") for chunk, target in chunks]
        )

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        logits, targets = ctx.saved_tensors
        weights = gradients[0].masked_fill(targets == IGNORED, 0.0)[:, None]
        logits_gradient = torch.empty_like(logits)
        tensors = (logits, targets, weights, logits_gradient)
        for chunk, target, weight, gradient in zip(*(torch.split(tensor, CHUNK) for tensor in tensors), strict=True):
            in_place = gradient.dtype == torch.float32
            probabilities = gradient if in_place else torch.empty_like(chunk, dtype=torch.float32)
            torch.softmax(chunk, dim=-1, dtype=torch.float32, out=probabilities)
            probabilities.mul_(weight).scatter_add_(1, target[:, None].clamp(min=0), -weight)
            if not in_place:
                gradient.copy_(probabilities)
        return logits_gradient, None


def forward(
    vlm: VisionLanguageModel,
    batch: Batch,
    hidden_layers: Sequence[int] = (),
    logit_mask: Tensor | None = None,
    packing: Packing | None = None,
    stop_after_last_hidden_layer: bool = False,
    wrapped: nn.Module | None = None,
) -> ForwardOutput:
    """Runs a batch of B samples and S positions through the model.

    Args:
        vlm: The model.
        batch: As `UnlearningCollator.encode` returns it.
        hidden_layers: The decoder layers whose outputs are returned, by number, 0 the first.
        logit_mask: [B, S] bool, the positions whose logits are computed. None selects the positions before an
            answer token.
        packing: The batch's packing from `packing_of`. None runs each question with its image.
        stop_after_last_hidden_layer: Computes no logits and skips the decoder layers above the last of `hidden_layers`.
            Layers are not skipped if FSDP or ZeRO-3 shards them.
        wrapped: The model inside the wrapper of DDP, FSDP or DeepSpeed, which is called instead. None calls the model.
    """
    labels = batch.get("labels", torch.full_like(batch["input_ids"], IGNORED))
    logit_mask = answer_mask(labels) if logit_mask is None else logit_mask
    if stop_after_last_hidden_layer:
        logit_mask = torch.zeros_like(logit_mask)
    inputs: dict[str, Any] = {key: value for key, value in batch.items() if key not in NON_MODEL_KEYS}
    positions = logit_mask.flatten().nonzero()[:, 0]
    if packing is not None:
        inputs = packed_inputs(vlm, inputs, packing, batch["images"])
        positions = packing.packed_index[logit_mask]
    logits, hidden = vlm.run(inputs, positions, hidden_layers, stop_after_last_hidden_layer, wrapped)
    if packing is not None:
        hidden = {layer: packing.unpack(states) for layer, states in hidden.items()}
    return ForwardOutput(logit_mask, logits, labels, hidden)
