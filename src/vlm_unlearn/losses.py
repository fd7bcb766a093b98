"""Losses as pure functions on tensors. They know no model, no trainer and no file.

Shapes: ``B`` samples, ``S`` positions, ``V`` vocabulary, ``H`` hidden size. Every function returns a scalar tensor unless it
says otherwise. In a masked mean each real token of the batch weighs the same, whatever the padding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # the label that transformers leaves out of the loss


def answer_mask(labels: Tensor) -> Tensor:
    """Positions whose *next* token is an answer token.

    Args:
        labels: [B, S], unshifted, -100 where ignored.

    Returns:
        [B, S] bool; the last column is always False.

    Example:
        labels ``[[-100, -100, 7, 8]]`` give ``[[False, True, True, False]]``.
    """
    mask = torch.zeros_like(labels, dtype=torch.bool)
    mask[:, :-1] = labels[:, 1:] != IGNORED
    return mask


def answer_nll(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each sample's answer tokens.

    Args:
        logits: [B, S, V]; position s predicts token s + 1.
        labels: [B, S] as in transformers: unshifted (shifted here), -100 ignored.

    Returns:
        ``(nll_sum [B], tokens [B])``; the per-sample token mean is ``nll_sum / tokens`` and the batch loss of transformers is
        ``nll_sum.sum() / tokens.sum()``.
    """
    targets = labels[:, 1:]
    nll = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
    return nll.sum(dim=1), (targets != IGNORED).sum(dim=1)


def npo_loss(nll: Tensor, reference_nll: Tensor, beta: float) -> Tensor:
    """Negative preference optimization on forget answers (Zhang et al. 2024, arXiv 2404.05868, eq. 3).

    Mean over samples of ``-2/beta * logsigmoid(beta * (nll - reference_nll))``. It falls as the answers get less likely
    than under the reference model and flattens once they are, unlike gradient ascent.

    Args:
        nll: [B], per-sample token mean or sequence sum under the current model.
        reference_nll: [B], the same quantity under the reference model.
        beta: inverse temperature, above 0.
    """
    return (-2.0 / beta * F.logsigmoid(beta * (nll - reference_nll))).mean()


def npo_retain_loss(nll: Tensor, reference_nll: Tensor, beta: float) -> Tensor:
    """The retain term of Safety Mirage's published NPO code: mean of ``+2/beta * logsigmoid(beta * (nll - reference_nll))``.

    It falls as retain answers get more likely than under the reference. Shapes as in `npo_loss`.
    """
    return -npo_loss(nll, reference_nll, beta)


def simnpo_loss(nll: Tensor, beta: float, gamma: float) -> Tensor:
    """SimNPO (Fan et al. 2024, arXiv 2410.07163, eq. 6): NPO without a reference, on length-normalised likelihoods.

    Mean over samples of ``-2/beta * logsigmoid(beta * nll - gamma)``.

    Args:
        nll: [B], per-sample token mean.
        beta: inverse temperature, above 0.
        gamma: margin; 0 in most of the paper's runs.
    """
    return (-2.0 / beta * F.logsigmoid(beta * nll - gamma)).mean()


def dpo_loss(
    preferred_nll: Tensor, rejected_nll: Tensor, preferred_reference: Tensor, rejected_reference: Tensor, beta: float
) -> Tensor:
    """Direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290, eq. 7), here of a harmless over a harmful answer.

    Mean over samples of ``-logsigmoid(beta * ((preferred_reference - preferred_nll) - (rejected_reference - rejected_nll)))``.

    Args:
        preferred_nll: [B], sequence sums (the paper) or token means under the current model.
        rejected_nll: [B], likewise.
        preferred_reference: [B], the same under the reference model.
        rejected_reference: [B], likewise.
        beta: inverse temperature, above 0.
    """
    gained = (preferred_reference - preferred_nll) - (rejected_reference - rejected_nll)
    return -F.logsigmoid(beta * gained).mean()


def undial_loss(logits: Tensor, reference_logits: Tensor, labels: Tensor, penalty: float) -> Tensor:
    """UNDIAL's self-distillation (Dong et al. 2024, arXiv 2402.10052, eq. 3-4), averaged over the answer tokens.

    Cross-entropy to the reference model's distribution once the logit of the answer's own token is lowered by `penalty`.

    Args:
        logits: [B, S, V]; position s predicts token s + 1.
        reference_logits: [B, S, V], under the reference model.
        labels: [B, S], unshifted, -100 ignored.
        penalty: what is taken off the token's logit (gamma in the paper), above 0.
    """
    mask = answer_mask(labels)[:, :-1]
    tokens = labels[:, 1:].clamp(min=0)
    lowered = reference_logits[:, :-1].float()
    lowered = lowered.scatter_add(-1, tokens[..., None], torch.full_like(lowered[..., :1], -penalty))
    cross_entropy = -(lowered.softmax(dim=-1) * F.log_softmax(logits[:, :-1].float(), dim=-1)).sum(dim=-1)
    return _masked_mean(cross_entropy, mask)


def rerouting_forget_loss(hidden: Tensor, reference_hidden: Tensor, mask: Tensor | None = None) -> Tensor:
    """Representation rerouting on forget text (Zou et al. 2024, arXiv 2406.04313, alg. 1): ``relu(cos(hidden, reference))``.

    Shapes as in `rmu_retain_loss`; 0 once the states are orthogonal to what they were.
    """
    return _masked_mean(F.relu(F.cosine_similarity(hidden.float(), reference_hidden.float(), dim=-1)), mask)


def rerouting_retain_loss(hidden: Tensor, reference_hidden: Tensor, mask: Tensor | None = None) -> Tensor:
    """Representation rerouting on retain text (arXiv 2406.04313, alg. 1): the Euclidean distance to the reference's hidden states.

    Shapes as in `rmu_retain_loss`.
    """
    # The gradient of a norm at 0 is undefined; at the first step the model is the reference.
    squared = (hidden.float() - reference_hidden.float()).square().sum(dim=-1)
    return _masked_mean(torch.where(squared > 0, squared.clamp(min=1e-12).sqrt(), 0.0 * squared), mask)


def kl_loss(logits: Tensor, reference_logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """``KL(reference || current)`` per position, averaged over the masked positions.

    Args:
        logits: [B, S, V] of the current model.
        reference_logits: [B, S, V] of the reference model.
        mask: [B, S] bool or 0/1; None averages over all positions, padding included, as SafeEraser's published code does.
    """
    current = F.log_softmax(logits.float(), dim=-1)
    reference = F.log_softmax(reference_logits.float(), dim=-1)
    divergence = (reference.exp() * (reference - current)).sum(dim=-1)
    return _masked_mean(divergence, mask)


def rmu_forget_loss(hidden: Tensor, control_vector: Tensor, mask: Tensor | None = None) -> Tensor:
    """RMU's forget term (Li et al. 2024, arXiv 2403.03218, eq. 2): MSE between hidden states and a fixed random vector.

    Args:
        hidden: [B, S, H], output of the steered decoder layer on the forget batch.
        control_vector: [H], the random unit direction times the steering coefficient.
        mask: [B, S], positions to steer; None takes all, padding and image tokens included (published code).
    """
    return _masked_mean((hidden.float() - control_vector.float()).square().mean(dim=-1), mask)


def rmu_retain_loss(hidden: Tensor, reference_hidden: Tensor, mask: Tensor | None = None) -> Tensor:
    """RMU's retain term (arXiv 2403.03218, eq. 3), without its weight: MSE to the reference model's hidden states.

    Shapes as in `rmu_forget_loss`; `reference_hidden` is [B, S, H].
    """
    return _masked_mean((hidden.float() - reference_hidden.float()).square().mean(dim=-1), mask)


def _masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return values.mean()
    weights = mask.to(values.dtype)
    return (values * weights).sum() / weights.sum().clamp(min=1.0)
