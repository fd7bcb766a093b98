"""One training step in the structure of published research code, written from descriptions, for the speed benchmarks.

Each role and each loss term has its own forward pass, and the reference is a second model. Logits are computed at
every position, in float32. Safety Mirage's methods run the retain questions once more for their cross-entropy. The
losses average over the same tokens as this package, so that they can be compared. simnpo, dpo, rr and undial are
not in either code and are written in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Batch = Mapping[str, Tensor]
Batches = Mapping[str, Batch]
Loss = Callable[[Any, Any, Batches], Tensor]  # model, reference, batches by role

NEEDS_REFERENCE = ("npo", "kl", "kl+pd", "rmu", "dpo", "undial", "rr")
LAYER = 3  # whose output rmu and rr use
BETA = 0.9  # of npo
DPO_BETA, SIMNPO_BETA, PENALTY, REROUTING = 0.1, 2.5, 10.0, 10.0


def inputs(batch: Batch) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if name in ("input_ids", "attention_mask", "pixel_values")}


def answers(batch: Batch) -> Tensor:
    """Returns [B, S] bool, True where the next token is an answer token."""
    return F.pad(batch["labels"][:, 1:] != -100, (0, 1))


def cross_entropy(model: Any, batch: Batch) -> Tensor:
    """Returns the causal-LM loss of transformers, from float32 logits at every position."""
    loss: Tensor = model(**inputs(batch), labels=batch["labels"], use_cache=False).loss
    return loss


def nll(model: Any, batch: Batch) -> Tensor:
    """Returns [B], the mean NLL of each answer."""
    logits = model(**inputs(batch), use_cache=False).logits.float()[:, :-1]
    token_nll = F.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], ignore_index=-100, reduction="none")
    return token_nll.sum(dim=1) / answers(batch).sum(dim=1)


def hidden(model: Any, batch: Batch) -> Tensor:
    """Returns [B, S, H], the output of the steered layer. The pass runs all layers and computes logits."""
    states: Tensor = model(**inputs(batch), output_hidden_states=True, use_cache=False).hidden_states[LAYER + 1]
    return states


def supervised(model: Any, _reference: Any, batches: Batches) -> Tensor:
    """po and mixed_sft: the loss of both sets as one batch, computed in two passes since their widths differ."""
    tokens = {role: answers(batches[role]).sum() for role in ("forget", "retain")}
    total = torch.stack([cross_entropy(model, batches[role]) * count for role, count in tokens.items()]).sum()
    return total / torch.stack(list(tokens.values())).sum()


def ga(model: Any, _reference: Any, batches: Batches) -> Tensor:
    return -cross_entropy(model, batches["forget"])


def gd(model: Any, reference: Any, batches: Batches) -> Tensor:
    return ga(model, reference, batches) + cross_entropy(model, batches["retain"])


def gd_pd(model: Any, reference: Any, batches: Batches) -> Tensor:
    halves = [0.5 * cross_entropy(model, batches[role]) for role in ("retain", "decouple")]
    return ga(model, reference, batches) + torch.stack(halves).sum()


def kl(model: Any, reference: Any, batches: Batches) -> Tensor:
    retain = batches["retain"]
    forget = cross_entropy(model, batches["forget"])
    current = F.log_softmax(model(**inputs(retain), use_cache=False).logits.float(), dim=-1)
    with torch.no_grad():
        reference_logs = F.log_softmax(reference(**inputs(retain), use_cache=False).logits.float(), dim=-1)
    divergence = F.kl_div(current, reference_logs, reduction="none", log_target=True).sum(dim=-1)
    return -forget + divergence[answers(retain)].mean()


def npo(model: Any, reference: Any, batches: Batches) -> Tensor:
    """Safety Mirage's NPO: differences of batch means for both roles, and a third pass for the cross-entropy."""
    terms = []
    for role, sign in (("forget", -1), ("retain", 1)):
        current = cross_entropy(model, batches[role])
        with torch.no_grad():
            reference_nll = cross_entropy(reference, batches[role])
        terms.append(sign * F.logsigmoid(BETA * (current - reference_nll)) * 2 / BETA)
    return torch.stack(terms).sum() + cross_entropy(model, batches["retain"])


def rmu(model: Any, reference: Any, batches: Batches) -> Tensor:
    """Safety Mirage's RMU. The control vector is in the forget batch."""
    forget, retain = batches["forget"], batches["retain"]
    current = hidden(model, retain)
    with torch.no_grad():
        reference_states = hidden(reference, retain)
    steered = (hidden(model, forget) - forget["control"]).square().mean(dim=-1)[forget["attention_mask"].bool()].mean()
    preserved = (current - reference_states).square().mean(dim=-1)[retain["attention_mask"].bool()].mean()
    return steered + preserved + cross_entropy(model, retain)


def simnpo(model: Any, _reference: Any, batches: Batches) -> Tensor:
    forget = (-2 / SIMNPO_BETA * F.logsigmoid(SIMNPO_BETA * nll(model, batches["forget"]))).mean()
    return forget + cross_entropy(model, batches["retain"])


def dpo(model: Any, reference: Any, batches: Batches) -> Tensor:
    def gain(role: str) -> Tensor:
        tokens = answers(batches[role]).sum(dim=1)
        with torch.no_grad():
            reference_nll = nll(reference, batches[role])
        return (reference_nll - nll(model, batches[role])) * tokens

    preference = -F.logsigmoid(DPO_BETA * (gain("preferred") - gain("forget"))).mean()
    return preference + cross_entropy(model, batches["retain"])


def undial(model: Any, reference: Any, batches: Batches) -> Tensor:
    forget = batches["forget"]
    current = F.log_softmax(model(**inputs(forget), use_cache=False).logits.float(), dim=-1)
    with torch.no_grad():
        lowered = reference(**inputs(forget), use_cache=False).logits.float()
        tokens = F.pad(forget["labels"][:, 1:].clamp(min=0), (0, 1))[..., None]
        target = lowered.scatter_add(-1, tokens, torch.full_like(lowered[..., :1], -PENALTY)).softmax(dim=-1)
    distilled = -(target * current).sum(dim=-1)[answers(forget)].mean()
    return distilled + cross_entropy(model, batches["retain"])


def rr(model: Any, reference: Any, batches: Batches) -> Tensor:
    """Circuit breakers at the start of a run, where the retain term is computed with weight 0."""
    forget, retain = batches["forget"], batches["retain"]
    with torch.no_grad():
        reference_states = {role: hidden(reference, batch) for role, batch in (("forget", forget), ("retain", retain))}
    rerouted = (
        F.cosine_similarity(hidden(model, forget), reference_states["forget"], dim=-1).relu()[answers(forget)].mean()
    )
    preserved = (
        (hidden(model, retain) - reference_states["retain"]).norm(dim=-1)[retain["attention_mask"].bool()].mean()
    )
    return REROUTING * (rerouted + 0 * preserved)


def decoupled(loss: Loss, weight: float) -> Loss:
    """Adds SafeEraser's prompt decoupling to a loss."""

    def total(model: Any, reference: Any, batches: Batches) -> Tensor:
        return loss(model, reference, batches) + weight * cross_entropy(model, batches["decouple"])

    return total


PUBLISHED: dict[str, Loss] = {
    "npo": npo,
    "rmu": rmu,
    "mixed_sft": supervised,
    "ga": ga,
    "gd": gd,
    "kl": kl,
    "po": supervised,
    "ga+pd": decoupled(ga, 0.5),
    "gd+pd": gd_pd,
    "kl+pd": decoupled(kl, 1.0),
    "po+pd": decoupled(supervised, 1.0),
    "simnpo": simnpo,
    "dpo": dpo,
    "undial": undial,
    "rr": rr,
}
