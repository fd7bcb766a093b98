"""One forward pass of a batch: logits at the positions that a loss uses, and the hidden states of selected layers.

Questions on one image can share its tokens (see `packing`), and no logits are computed for positions that no loss uses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm_unlearn.data.encoding import Batch
from vlm_unlearn.losses import IGNORED, answer_mask
from vlm_unlearn.methods import Method
from vlm_unlearn.modeling.batch_merge import NON_MODEL_KEYS
from vlm_unlearn.modeling.packing import Packing, find_packing, packed_batch, prefix_sharing_unsupported_reason
from vlm_unlearn.modeling.shared_attention import ATTENTION_IMPLEMENTATION
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
        packed = packed_batch(inputs, packing, batch["images"], vlm.position_ids(inputs), vlm.image_token_id)
        inputs = {**packed, **_attention_inputs(vlm, packing)}
        positions = packing.packed_index[logit_mask]
    with (
        _capture_hidden_states(vlm, hidden_layers, stop_after_last_hidden_layer) as captured,
        _logits_at(vlm, positions),
    ):
        logits = (vlm.model if wrapped is None else wrapped)(**inputs, use_cache=False).logits[0]
    hidden = {layer: states if packing is None else packing.unpack(states) for layer, states in captured.items()}
    return ForwardOutput(logit_mask, logits, labels, hidden)


def packing_of(vlm: VisionLanguageModel, batch: Batch, method: Method) -> Packing | None:
    """Returns how the questions of a batch share their images, or None if they do not.

    Args:
        vlm: The model.
        batch: A batch padded on the right. Its ``images`` [B] contains a key for each image.
        method: Some methods do not support prefix sharing.
    """
    if "images" not in batch or "pixel_values" not in batch:
        return None
    if prefix_sharing_unsupported_reason(vlm, method, vlm.attn_implementation) is not None:
        return None
    if vlm.sliding_window and batch["input_ids"].shape[1] > vlm.sliding_window:
        return None  # a sliding window would count the positions of the packed sequence
    return find_packing(batch["input_ids"], batch["attention_mask"].bool(), batch["images"], vlm.image_token_id)


def _attention_inputs(vlm: VisionLanguageModel, packing: Packing) -> dict[str, Any]:
    """Returns the model inputs that restrict attention within a packed sequence."""
    if vlm.attn_implementation == "flex_attention":
        return {"attention_mask": packing.block_mask()}
    # Not reset afterwards: gradient checkpointing re-runs attention in backward. Unpacked batches fall through to SDPA.
    vlm.attn_implementation = ATTENTION_IMPLEMENTATION
    # transformers passes a mask of four dimensions on unchanged, and `shared_attention` ignores it.
    unused_mask = torch.zeros(1, 1, 1, 1, dtype=vlm.base_model.dtype, device=vlm.base_model.device)
    return {"attention_mask": unused_mask, "packed_attention": packing.attention}


@contextmanager
def _capture_hidden_states(
    vlm: VisionLanguageModel, layers: Sequence[int], stop_after_last_hidden_layer: bool
) -> Iterator[dict[int, Tensor]]:
    """Yields a dict that the forward pass fills with the outputs of the selected decoder layers."""
    captured: dict[int, Tensor] = {}

    def capture_as(layer: int) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            captured[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    with ExitStack() as cleanup:
        for layer in layers:
            cleanup.callback(vlm.decoder_layers[layer].register_forward_hook(capture_as(layer)).remove)
        if stop_after_last_hidden_layer:
            cleanup.enter_context(vlm.truncated_decoder(max(layers) + 1))
        yield captured


@contextmanager
def _logits_at(vlm: VisionLanguageModel, positions: Tensor) -> Iterator[None]:
    """Makes the model return logits [1, N, V] at N positions of the flattened batch instead of all [B, S, V]."""

    def select(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (inputs[0].flatten(0, 1)[positions][None],)

    hook = vlm.base_model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        hook.remove()
