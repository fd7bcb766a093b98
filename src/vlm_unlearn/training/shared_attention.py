"""Attention over a packed sequence, by the parts it has: each beginning sees itself, each rest its beginning and itself.

A dense mask over the whole sequence would compute all that is masked too. Registered with transformers as an attention implementation;
without parts it is ``sdpa``.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "shared_image"  # in transformers' register


@dataclass(frozen=True)
class Parts:
    """Where the parts of a packed sequence of N positions are, each padded to the longest of its kind."""

    beginnings: Tensor  # [G, S] places of the tokens that questions share, or of a question that shares nothing
    rests: Tensor  # [R, T] places of what each question has of its own
    group: Tensor  # [R] the number of a rest's beginning
    seen: Tensor  # [R, 1, T, S + T] bool, what a rest's positions see of its beginning and of itself
    back: Tensor  # [N] where each position is among the beginnings and rests laid end to end

    def to(self, device: torch.device) -> Parts:
        """The same on a device."""
        return Parts(*(getattr(self, field.name).to(device) for field in fields(self)))


def shared_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    parts: Parts | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """[1, N, heads, width] of queries [1, heads, N, width] and as many keys and values, or fewer heads of them.

    Args:
        parts: those of the packed sequence; the mask isn't read then.
    """
    if parts is None:
        plain: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
        return plain
    groups = getattr(module, "num_key_value_groups", 1)
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    first, *before = (_take(tensor, parts.beginnings) for tensor in (query, key, value))
    keys, values = (repeat_kv(tensor, groups) for tensor in before)
    found = F.scaled_dot_product_attention(first, keys, values, dropout_p=dropout, is_causal=True, scale=scaling)
    laid = [found.transpose(1, 2).flatten(0, 1)]
    if len(parts.rests):
        keys, values = (
            repeat_kv(torch.cat([shared.index_select(0, parts.group), _take(own, parts.rests)], dim=2), groups)
            for shared, own in zip(before, (key, value), strict=True)
        )
        found = F.scaled_dot_product_attention(
            _take(query, parts.rests), keys, values, attn_mask=parts.seen, dropout_p=dropout, scale=scaling
        )
        laid.append(found.transpose(1, 2).flatten(0, 1))
    return torch.cat(laid).index_select(0, parts.back)[None], None


def _take(tensor: Tensor, places: Tensor) -> Tensor:
    """[P, heads, S, width] of a tensor [N, heads, width] at places [P, S]."""
    return tensor.index_select(0, places.flatten()).view(*places.shape, *tensor.shape[1:]).transpose(1, 2)


AttentionInterface.register(NAME, shared_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
