"""Losses as pure functions on tensors. They depend on no model, no trainer and no file.

Shapes: ``B`` samples, ``S`` positions, ``V`` vocabulary, ``H`` hidden size. Every function returns a scalar tensor
    unless its
docstring states otherwise. In a masked mean, each token of the batch has the same weight, regardless of padding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # the label of positions that transformers excludes from the loss


def answer_mask(labels: Tensor) -> Tensor:
    """Returns the positions whose *next* token is an answer token.

    Args:
        labels: [B, S], unshifted, -100 where ignored.

    Returns:
        [B, S] bool. The last column is always False.

    Example:
        Labels ``[[-100, -100, 7, 8]]`` give ``[[False, True, True, False]]``.
    """
    mask = torch.zeros_like(labels, dtype=torch.bool)
    mask[:, :-1] = labels[:, 1:] != IGNORED
    return mask


def answer_nll(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the negative log-likelihood (NLL) of each sample's answer tokens.

    Args:
        logits: [B, S, V]. Position s predicts token s + 1.
        labels: [B, S] as in transformers: unshifted (this function shifts them), -100 where ignored.

    Returns:
        ``(nll_sum [B], tokens [B])``. The token mean per sample is ``nll_sum / tokens``, and the batch loss of
        transformers is ``nll_sum.sum() / tokens.sum()``.
    """
    targets = labels[:, 1:]
    nll = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
    return nll.sum(dim=1), (targets != IGNORED).sum(dim=1)


def bounded_ascent_loss(logits: Tensor, labels: Tensor, max_nll: float) -> Tensor:
    """Gradient ascent with a bound: minus the mean over answer tokens of ``min(nll, max_nll)``.

    A token stops contributing to the gradient when its NLL reaches the bound. Until then its gradient does not
    fade, unlike that of `npo_loss`, which a single unlikely token of the answer can satisfy.

    Args:
        logits: [B, S, V]. Position s predicts token s + 1.
        labels: [B, S], unshifted, -100 where ignored.
        max_nll: The bound of each token's NLL, above 0.
    """
    targets = labels[:, 1:]
    nll = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
    return -_masked_mean(nll.clamp(max=max_nll), targets != IGNORED)


def npo_loss(nll: Tensor, reference_nll: Tensor, beta: float) -> Tensor:
    """Negative preference optimization on forget answers (Zhang et al. 2024, arXiv 2404.05868, eq. 3).

    Mean over samples of ``-2/beta * logsigmoid(beta * (nll - reference_nll))``. It decreases as the answers become less
    likely than under the reference model and then flattens, unlike gradient ascent.

    Args:
        nll: [B], token mean or sequence sum of each sample under the current model.
        reference_nll: [B], the same quantity under the reference model.
        beta: Inverse temperature, above 0.
    """
    return (-2.0 / beta * F.logsigmoid(beta * (nll - reference_nll))).mean()


def npo_retain_loss(nll: Tensor, reference_nll: Tensor, beta: float) -> Tensor:
    """Retain term of Safety Mirage's published NPO code: mean of ``2/beta * logsigmoid(beta * (nll - reference_nll))``.

    It decreases as the retain answers become more likely than under the reference model. Shapes as in `npo_loss`.
    """
    return -npo_loss(nll, reference_nll, beta)


def simnpo_loss(nll: Tensor, beta: float, gamma: float) -> Tensor:
    """SimNPO (Fan et al. 2024, arXiv 2410.07163, eq. 6): NPO on length-normalized likelihoods, without reference.

    Mean over samples of ``-2/beta * logsigmoid(beta * nll - gamma)``.

    Args:
        nll: [B], token mean of each sample.
        beta: Inverse temperature, above 0.
        gamma: Margin, 0 in most of the paper's runs.
    """
    return (-2.0 / beta * F.logsigmoid(beta * nll - gamma)).mean()


def dpo_loss(
    preferred_nll: Tensor, rejected_nll: Tensor, preferred_reference: Tensor, rejected_reference: Tensor, beta: float
) -> Tensor:
    """Direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290, eq. 7) of harmless over harmful answers.

    Mean over samples of ``-logsigmoid(beta * (preferred_gain - rejected_gain))``. The gain of an answer is its NLL
    under the reference model minus that under the current model.

    Args:
        preferred_nll: [B], sequence sums (the paper) or token means under the current model.
        rejected_nll: [B], the same quantity for the rejected answers.
        preferred_reference: [B], `preferred_nll` under the reference model.
        rejected_reference: [B], `rejected_nll` under the reference model.
        beta: Inverse temperature, above 0.
    """
    margin = (preferred_reference - preferred_nll) - (rejected_reference - rejected_nll)
    return -F.logsigmoid(beta * margin).mean()


def undial_loss(logits: Tensor, reference_logits: Tensor, labels: Tensor, penalty: float) -> Tensor:
    """UNDIAL's self-distillation (Dong et al. 2024, arXiv 2402.10052, eq. 3-4), averaged over the answer tokens.

    Cross-entropy to the reference model's distribution after `penalty` is subtracted from the logit of the answer's
    token.

    Args:
        logits: [B, S, V]. Position s predicts token s + 1.
        reference_logits: [B, S, V], under the reference model.
        labels: [B, S], unshifted, -100 where ignored.
        penalty: The amount by which the logit is lowered (gamma in the paper), above 0.
    """
    mask = answer_mask(labels)[:, :-1]
    tokens = labels[:, 1:].clamp(min=0)
    lowered = reference_logits[:, :-1].float()
    lowered = lowered.scatter_add(-1, tokens[..., None], torch.full_like(lowered[..., :1], -penalty))
    cross_entropy = -(lowered.softmax(dim=-1) * F.log_softmax(logits[:, :-1].float(), dim=-1)).sum(dim=-1)
    return _masked_mean(cross_entropy, mask)


def rerouting_forget_loss(hidden: Tensor, reference_hidden: Tensor, mask: Tensor | None = None) -> Tensor:
    """Representation rerouting on forget text: mean of ``relu(cos(hidden, reference))``.

    It is 0 if the hidden states are orthogonal to those of the reference model (Zou et al. 2024, arXiv 2406.04313,
    alg. 1). Shapes as in `rmu_retain_loss`.
    """
    return _masked_mean(F.relu(F.cosine_similarity(hidden.float(), reference_hidden.float(), dim=-1)), mask)


def rerouting_retain_loss(hidden: Tensor, reference_hidden: Tensor, mask: Tensor | None = None) -> Tensor:
    """Representation rerouting on retain text: Euclidean distance to the reference model's hidden states.

    Source: Zou et al. 2024, arXiv 2406.04313, alg. 1. Shapes as in `rmu_retain_loss`.
    """
    # The gradient of a norm is undefined at 0, and at the first step the model equals the reference.
    squared = (hidden.float() - reference_hidden.float()).square().sum(dim=-1)
    return _masked_mean(torch.where(squared > 0, squared.clamp(min=1e-12).sqrt(), 0.0 * squared), mask)


def kl_loss(logits: Tensor, reference_logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """``KL(reference || current)`` per position, averaged over the masked positions.

    Args:
        logits: [B, S, V] of the current model.
        reference_logits: [B, S, V] of the reference model.
        mask: [B, S] bool or 0/1. None averages over all positions including padding, like SafeEraser's published code.
    """
    current = F.log_softmax(logits.float(), dim=-1)
    reference = F.log_softmax(reference_logits.float(), dim=-1)
    divergence = (reference.exp() * (reference - current)).sum(dim=-1)
    return _masked_mean(divergence, mask)


def rmu_forget_loss(hidden: Tensor, control_vector: Tensor, mask: Tensor | None = None) -> Tensor:
    """RMU's forget term (Li et al. 2024, arXiv 2403.03218, eq. 2): MSE between hidden states and a fixed random vector.

    Args:
        hidden: [B, S, H], the output of the steered decoder layer on the forget batch.
        control_vector: [H], the random unit direction times the steering coefficient.
        mask: [B, S], the positions to steer. None steers all, including padding and image tokens (published code).
    """
    return _masked_mean((hidden.float() - control_vector.float()).square().mean(dim=-1), mask)


def rmu_retain_loss(hidden: Tensor, reference_hidden: Tensor, mask: Tensor | None = None) -> Tensor:
    """RMU's retain term (arXiv 2403.03218, eq. 3), without its weight: MSE to the reference model's hidden states.

    Shapes as in `rmu_forget_loss`. `reference_hidden` is [B, S, H].
    """
    return _masked_mean((hidden.float() - reference_hidden.float()).square().mean(dim=-1), mask)


def _masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return values.mean()
    weights = mask.to(values.dtype)
    return (values * weights).sum() / weights.sum().clamp(min=1.0)
