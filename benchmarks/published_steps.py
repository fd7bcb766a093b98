"""One training step as the two published codes structure it, written from their description: what the speed benchmarks compare with.

Each role is a forward pass of its own, a reference is a second model, logits are made at every position and in float32, and
Safety Mirage's methods run the retain questions once more for their cross-entropy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Batch = Mapping[str, Tensor]
NEEDS_REFERENCE = ("npo", "kl", "rmu")


def inputs(batch: Batch) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if name in ("input_ids", "attention_mask", "pixel_values")}


def cross_entropy(model: Any, batch: Batch) -> Tensor:
    """The causal-LM loss of transformers: mean over the batch's answer tokens, from float32 logits at every position."""
    loss: Tensor = model(**inputs(batch), labels=batch["labels"], use_cache=False).loss
    return loss


def without_gradient(model: Any, batch: Batch) -> Tensor:
    with torch.no_grad():
        return cross_entropy(model, batch)


def npo(model: Any, reference: Any, batches: Mapping[str, Batch]) -> Tensor:
    """Safety Mirage: difference of batch means on both sides, and a third pass for the cross-entropy."""
    beta = 0.9
    forget = cross_entropy(model, batches["forget"]) - without_gradient(reference, batches["forget"])
    retain = cross_entropy(model, batches["retain"]) - without_gradient(reference, batches["retain"])
    push = -F.logsigmoid(beta * forget) * 2 / beta
    hold = F.logsigmoid(beta * retain) * 2 / beta
    return push + hold + cross_entropy(model, batches["retain"])


def gd_pd(model: Any, _reference: Any, batches: Mapping[str, Batch]) -> Tensor:
    """SafeEraser's gradient difference with prompt decoupling."""
    forget, retain, decouple = (cross_entropy(model, batches[role]) for role in ("forget", "retain", "decouple"))
    return -forget + 0.5 * retain + 0.5 * decouple


def kl(model: Any, reference: Any, batches: Mapping[str, Batch]) -> Tensor:
    """SafeEraser's KL term; the divergence at the answers, as ours, over logits made everywhere."""
    forget = cross_entropy(model, batches["forget"])
    retain = batches["retain"]
    current = model(**inputs(retain), use_cache=False).logits.float()
    with torch.no_grad():
        before = reference(**inputs(retain), use_cache=False).logits.float()
    current, before = F.log_softmax(current, dim=-1), F.log_softmax(before, dim=-1)
    divergence = F.kl_div(current, before, reduction="none", log_target=True).sum(dim=-1)
    answers = F.pad(retain["labels"][:, 1:] != -100, (0, 1))
    return -forget + divergence[answers].mean()


def rmu(model: Any, reference: Any, batches: Mapping[str, Batch], layer: int, control: Tensor) -> Tensor:
    """Safety Mirage's RMU; every pass goes through all layers and makes logits. Real tokens count, as in ours."""

    def hidden(of: Any, batch: Batch) -> Tensor:
        return of(**inputs(batch), output_hidden_states=True, use_cache=False).hidden_states[layer + 1]  # type: ignore[no-any-return]

    forget, retain = batches["forget"], batches["retain"]
    now = hidden(model, retain)
    with torch.no_grad():
        before = hidden(reference, retain)
    push = (hidden(model, forget) - control).square().mean(dim=-1)[forget["attention_mask"].bool()].mean()
    hold = (now - before).square().mean(dim=-1)[retain["attention_mask"].bool()].mean()
    return push + hold + cross_entropy(model, retain)
