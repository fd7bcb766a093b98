"""One pass of a batch through a model: logits where an answer token is predicted, hidden states of the layers that a loss uses.

Nothing is run twice: questions on one image share it (`packing`), and no logits are made for what no loss reads.
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
from vlm_unlearn.models.layout import decoder_layers, get_base_model, layout_of
from vlm_unlearn.training.batch_merge import NON_MODEL_KEYS
from vlm_unlearn.training.packing import Packing, find_packing, packed_batch, prefix_sharing_unsupported_reason
from vlm_unlearn.training.shared_attention import NAME

CHUNK = 1024  # tokens whose logits are held in float32 at a time


@dataclass(frozen=True)
class Forward:
    """What one pass of a batch through a model gave."""

    wanted: Tensor  # [B, S] bool, the positions that have logits
    logits: Tensor  # [N, V] at the wanted positions, row after row
    labels: Tensor  # [B, S]
    hidden: Mapping[int, Tensor]  # [B, S, H] by decoder layer

    @cached_property
    def answer_nll(self) -> tuple[Tensor, Tensor]:
        """``(nll_sum [B], tokens [B])`` of the answers."""
        predicts = answer_mask(self.labels)
        targets = self.labels.roll(-1, dims=1).masked_fill(~predicts, IGNORED)[self.wanted]
        nll: Tensor = _AnswerNLL.apply(self.logits, targets)  # type: ignore[no-untyped-call]
        rows = self.wanted.nonzero()[:, 0]
        return nll.new_zeros(len(self.labels)).index_add(0, rows, nll), predicts.sum(dim=1)

    @cached_property
    def columns(self) -> Tensor:
        """[K] from the first wanted position of any row to one behind the last one."""
        found = self.wanted.any(dim=0).nonzero()
        first, last = (int(found.min()), min(int(found.max()) + 1, self.wanted.shape[1] - 1)) if len(found) else (0, 0)
        return torch.arange(first, last + 1, device=self.wanted.device)

    def block(self) -> Tensor:
        """[B, K, V] logits at `columns`; zeros where none are wanted."""
        wanted = self.wanted[:, self.columns]
        return self.logits.new_zeros(*wanted.shape, self.logits.shape[-1]).index_put((wanted,), self.logits)

    def parted(self, shapes: Sequence[tuple[int, int]]) -> list[Forward]:
        """What the pass gave for each of the batches that were joined, of B rows and S positions."""
        counts = [rows for rows, _ in shapes]
        wanted, labels = torch.split(self.wanted, counts), torch.split(self.labels, counts)
        logits = torch.split(self.logits, torch.stack([part.sum() for part in wanted]).tolist())
        hidden = {layer: torch.split(states, counts) for layer, states in self.hidden.items()}
        return [
            Forward(
                wanted[n][:, :width],
                logits[n],
                labels[n][:, :width],
                {layer: parts[n][:, :width] for layer, parts in hidden.items()},
            )
            for n, (_, width) in enumerate(shapes)
        ]


class _AnswerNLL(torch.autograd.Function):
    """[N] float32 negative log-likelihoods of targets [N], 0 where they are ignored, from logits [N, V] of any precision.

    Nothing of the vocabulary's size is kept but the logits; float32 copies are made of `CHUNK` rows at a time. PyTorch's cross-entropy
    would keep one of all rows, and its gradient is another.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(logits, targets)
        parts = zip(torch.split(logits, CHUNK), torch.split(targets, CHUNK), strict=True)
        return torch.cat(
            [F.cross_entropy(part.float(), target, ignore_index=IGNORED, reduction="none") for part, target in parts]
        )

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        logits, targets = ctx.saved_tensors
        weights = gradients[0].masked_fill(targets == IGNORED, 0.0)[:, None]
        found = torch.empty_like(logits)
        for part, target, weight, gradient in zip(
            *(torch.split(each, CHUNK) for each in (logits, targets, weights, found)), strict=True
        ):
            probabilities = gradient if gradient.dtype == torch.float32 else torch.empty_like(part, dtype=torch.float32)
            torch.softmax(part, dim=-1, dtype=torch.float32, out=probabilities)
            probabilities.mul_(weight).scatter_add_(1, target[:, None].clamp(min=0), -weight)
            if probabilities is not gradient:
                gradient.copy_(probabilities)
        return found, None


def forward(
    model: nn.Module,
    batch: Batch,
    layers: Sequence[int] = (),
    wanted: Tensor | None = None,
    packing: Packing | None = None,
    stop: bool = False,
) -> Forward:
    """Runs a batch [B, S] through the model.

    Args:
        layers: the decoder layers whose outputs are kept, by number.
        wanted: [B, S] bool, where logits are wanted; None: where an answer token is next.
        packing: that of the batch (`packing_of`); None runs each question with its image.
        stop: leave out decoder layers above the last of `layers`, if none is cut up among processes, and all logits.
    """
    labels = batch.get("labels", torch.full_like(batch["input_ids"], IGNORED))
    wanted = answer_mask(labels) if wanted is None else wanted
    if stop:
        wanted = torch.zeros_like(wanted)
    inner = get_base_model(getattr(model, "module", model))
    inputs: dict[str, Any] = {key: value for key, value in batch.items() if key not in NON_MODEL_KEYS}
    places = wanted.flatten().nonzero()[:, 0]
    if packing is not None:
        inputs = {**packed_batch(inputs, packing, batch["images"], _positions(inner, inputs)), **_seen(inner, packing)}
        places = packing.place[wanted]
    with _capture_hidden_states(inner, layers, stop) as seen, _logits_at(inner, places):
        logits = model(**inputs, use_cache=False).logits[0]
    hidden = {layer: states if packing is None else packing.unpack(states) for layer, states in seen.items()}
    return Forward(wanted, logits, labels, hidden)


def packing_of(model: nn.Module, batch: Batch, method: Method) -> Packing | None:
    """How questions of a batch, padded on the right, share their images (``images`` [B]); None where they don't.

    The model may be wrapped. A sliding window counts positions of the packed sequence: nothing is packed that could reach it.
    """
    inner: Any = get_base_model(getattr(model, "module", model))
    if (
        "images" not in batch
        or "pixel_values" not in batch
        or prefix_sharing_unsupported_reason(inner, method, _attention(inner)) is not None
    ):
        return None
    window = getattr(inner.config.get_text_config(), "sliding_window", None)
    if window and batch["input_ids"].shape[1] > window:
        return None
    return find_packing(
        batch["input_ids"], batch["attention_mask"].bool(), batch["images"], inner.config.image_token_id
    )


def _positions(inner: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """[B, S] or, where the family has several axes, [3, B, S] position ids of the unpacked batch."""
    if "image_grid_thw" in inputs:
        names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
        positions: Tensor = inner.model.get_rope_index(**{name: inputs[name] for name in names})[0]
        return positions
    rows, width = inputs["input_ids"].shape
    return torch.arange(width, device=inputs["input_ids"].device).expand(rows, width)


def _seen(inner: Any, packing: Packing) -> dict[str, Any]:
    """What tells the model's attention which positions of a packed sequence see which."""
    if _attention(inner) == "flex_attention":
        return {"attention_mask": packing.block_mask()}
    # For good: gradient checkpointing computes attention again in the backward pass. Of what isn't packed it makes no difference.
    inner.config.get_text_config()._attn_implementation = NAME
    nothing = torch.zeros(
        1, 1, 1, 1, dtype=inner.dtype, device=inner.device
    )  # a mask of four dimensions is left as it is
    return {"attention_mask": nothing, "parts": packing.parts}


def _attention(inner: Any) -> str:
    """transformers' name of how the language model computes attention."""
    name: str = inner.config.get_text_config()._attn_implementation
    return name


@contextmanager
def _capture_hidden_states(inner: nn.Module, numbers: Sequence[int], stop: bool) -> Iterator[dict[int, Tensor]]:
    seen: dict[int, Tensor] = {}

    def keeping(number: int) -> Any:
        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            seen[number] = output[0] if isinstance(output, tuple) else output

        return keep

    with ExitStack() as undo:
        for number in numbers:
            undo.callback(decoder_layers(inner)[number].register_forward_hook(keeping(number)).remove)
        if stop:
            undo.enter_context(_truncated_decoder(inner, max(numbers) + 1))
        yield seen


@contextmanager
def _truncated_decoder(inner: nn.Module, count: int) -> Iterator[None]:
    """Leaves the language model its first `count` decoder layers; all of them where FSDP or ZeRO-3 prepares each for the next."""
    path, _, name = layout_of(inner).layers.rpartition(".")
    parent, layers = inner.get_submodule(path), decoder_layers(inner)
    cut_up = hasattr(layers[0], "set_requires_gradient_sync") or any(
        hasattr(parameter, "ds_id") for parameter in layers.parameters()
    )
    setattr(parent, name, layers if cut_up else layers[:count])
    try:
        yield
    finally:
        setattr(parent, name, layers)


@contextmanager
def _logits_at(inner: Any, places: Tensor) -> Iterator[None]:
    """Makes the model's logits [1, N, V] those of N places, counted through the whole batch, instead of all [B, S, V]."""

    def pick(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (inputs[0].flatten(0, 1)[places][None],)

    hook = inner.get_output_embeddings().register_forward_pre_hook(pick)
    try:
        yield
    finally:
        hook.remove()
