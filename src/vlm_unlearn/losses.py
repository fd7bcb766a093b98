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
