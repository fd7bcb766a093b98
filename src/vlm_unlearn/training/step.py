"""One training step's batches seen through the model: every value is computed once, when a method first asks for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vlm_unlearn.data.batching import Batch
from vlm_unlearn.losses import IGNORED, answer_nll
from vlm_unlearn.methods import Role
from vlm_unlearn.models.layout import decoder_layers
from vlm_unlearn.training.references import ReferenceModel

NOT_FOR_THE_MODEL = ("labels", "reference_nll_sum", "reference_tokens")


class Forward:
    """What one pass of a batch through a model gave."""

    def __init__(self, answer: tuple[Tensor, Tensor] | None, hidden: Tensor | None) -> None:
        self._answer = answer
        self.hidden = hidden

    @property
    def answer(self) -> tuple[Tensor, Tensor]:
        """``(nll_sum [B], tokens [B])`` of the answers."""
        assert self._answer is not None, "this batch has no answer tokens"
        return self._answer


def forward(model: nn.Module, batch: Batch, layer_module: nn.Module | None) -> Forward:
    """Runs a batch [B, S] through the model, with logits at answer positions only.

    Args:
        layer_module: the decoder layer whose output is kept as ``hidden`` [B, S, H], or None.
    """
    inputs: dict[str, Any] = {key: value for key, value in batch.items() if key not in NOT_FOR_THE_MODEL}
    labels = batch.get("labels")
    if labels is None:
        kept = torch.zeros(1, dtype=torch.long, device=batch["input_ids"].device)
    else:
        answered = (labels != IGNORED).any(dim=0).nonzero()
        # One position before the first answer token of any row, to the last one: full-vocabulary logits nowhere else.
        kept = torch.arange(int(answered.min()) - 1, int(answered.max()) + 1, device=labels.device)
    with _captured(layer_module) as seen:
        logits = model(**inputs, logits_to_keep=kept, use_cache=False).logits
    if labels is None:
        return Forward(None, seen.get("hidden"))
    return Forward(answer_nll(logits, labels[:, kept]), seen.get("hidden"))


@contextmanager
def _captured(layer: nn.Module | None) -> Iterator[dict[str, Tensor]]:
    seen: dict[str, Tensor] = {}
    if layer is None:
        yield seen
        return

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        seen["hidden"] = output[0] if isinstance(output, tuple) else output

    handle = layer.register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


class ModelStep:
    """`vlm_unlearn.methods.Step` over a model and its reference."""

    def __init__(self, model: nn.Module, batches: Mapping[Role, Batch], hidden_layer: int | None, reference: ReferenceModel | None) -> None:
        self._model = model
        self._batches = batches
        self._reference = reference
        self._layer = None if hidden_layer is None else decoder_layers(getattr(model, "module", model))[hidden_layer]
        self._current: dict[Role, Forward] = {}
        self._before: dict[Role, Forward] = {}

    def _now(self, role: Role) -> Forward:
        if role not in self._current:
            self._current[role] = forward(self._model, self._batches[role], self._layer)
        return self._current[role]

    def _then(self, role: Role) -> Forward:
        if role not in self._before:
            assert self._reference is not None, "the method asked for a reference that it did not declare in `needs`"
            with self._reference.active(self._model) as reference:
                self._before[role] = forward(reference, self._batches[role], self._layer)
        return self._before[role]

    def nll(self, role: Role, reduction: Literal["mean", "sum"] = "mean") -> Tensor:
        nll_sum, tokens = self._now(role).answer
        return nll_sum / tokens if reduction == "mean" else nll_sum

    def reference_nll(self, role: Role, reduction: Literal["mean", "sum"] = "mean") -> Tensor:
        nll_sum, tokens = self._reference_answer(role)
        return nll_sum / tokens if reduction == "mean" else nll_sum

    def cross_entropy(self, *roles: Role) -> Tensor:
        answers = [self._now(role).answer for role in roles]
        total = torch.stack([nll_sum.sum() for nll_sum, _ in answers]).sum()
        return total / torch.stack([tokens.sum() for _, tokens in answers]).sum()

    def batch_nll(self, role: Role) -> tuple[Tensor, Tensor]:
        reference_sum, tokens = self._reference_answer(role)
        return self.cross_entropy(role), reference_sum.sum() / tokens.sum()

    def hidden(self, role: Role) -> Tensor:
        hidden = self._now(role).hidden
        assert hidden is not None, "the method asked for hidden states but names no hidden_layer"
        return hidden

    def reference_hidden(self, role: Role) -> Tensor:
        hidden = self._then(role).hidden
        assert hidden is not None, "the method asked for hidden states but names no hidden_layer"
        return hidden

    def attention_mask(self, role: Role) -> Tensor:
        return self._batches[role]["attention_mask"]

    def _reference_answer(self, role: Role) -> tuple[Tensor, Tensor]:
        batch = self._batches[role]
        if "reference_nll_sum" in batch:
            return batch["reference_nll_sum"], batch["reference_tokens"]
        return self._then(role).answer
