"""Attention over a packed sequence, one call for all prefixes and one for all suffixes.

A dense mask over the packed sequence would also compute everything that it masks. This function is registered with
transformers as an attention implementation. Without segments it is the same as ``sdpa``.
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

ATTENTION_IMPLEMENTATION = "shared_image"  # the name under which transformers finds `shared_attention`


@dataclass(frozen=True)
class AttentionSegments:
    """The prefixes and suffixes of a packed sequence of N positions.

    There are G prefixes, padded to S positions, and R suffixes, padded to T positions. A question that shares
    nothing is a prefix without suffixes.
    """

    prefixes: Tensor  # [G, S] indices into the packed sequence
    suffixes: Tensor  # [R, T] indices into the packed sequence
    prefix_of_suffix: Tensor  # [R] the number of each suffix's prefix
    attention_mask: Tensor  # [R, 1, T, S + T] bool, the positions of its prefix and of itself that a suffix attends to
    inverse_index: Tensor  # [N] the index of each position in the concatenation of prefixes and suffixes, flattened

    def to(self, device: torch.device) -> AttentionSegments:
        """Returns a copy on a device."""
        return AttentionSegments(*(getattr(self, field.name).to(device) for field in fields(self)))


def shared_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    attention_segments: AttentionSegments | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Computes attention with the signature of transformers' attention functions.

    Args:
        module: The attention layer. Its `num_key_value_groups` is the number of query heads per key head.
        query: [1, heads, N, width].
        key: [1, key heads, N, width].
        value: [1, key heads, N, width].
        attention_mask: Ignored if `attention_segments` is set.
        dropout: Probability of dropping an attention weight.
        scaling: Factor on the attention scores. None uses ``1 / sqrt(width)``.
        attention_segments: The segments of a packed sequence. None calls SDPA with the mask.

    Returns:
        ``([1, N, heads, width], None)``, without attention weights.
    """
    if attention_segments is None:
        output: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output
    segments = attention_segments
    groups = getattr(module, "num_key_value_groups", 1)
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    prefix_queries, *prefix_keys_values = (_gather(tensor, segments.prefixes) for tensor in (query, key, value))
    keys, values = (repeat_kv(tensor, groups) for tensor in prefix_keys_values)
    attended = F.scaled_dot_product_attention(
        prefix_queries, keys, values, dropout_p=dropout, is_causal=True, scale=scaling
    )
    outputs = [attended.transpose(1, 2).flatten(0, 1)]
    if len(segments.suffixes):
        keys, values = (
            repeat_kv(
                torch.cat(
                    [prefix.index_select(0, segments.prefix_of_suffix), _gather(tensor, segments.suffixes)], dim=2
                ),
                groups,
            )
            for prefix, tensor in zip(prefix_keys_values, (key, value), strict=True)
        )
        suffix_queries = _gather(query, segments.suffixes)
        attended = F.scaled_dot_product_attention(
            suffix_queries, keys, values, attn_mask=segments.attention_mask, dropout_p=dropout, scale=scaling
        )
        outputs.append(attended.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, segments.inverse_index)[None], None


def _gather(tensor: Tensor, indices: Tensor) -> Tensor:
    """Returns [P, heads, S, width]: the entries of a tensor [N, heads, width] at indices [P, S]."""
    return tensor.index_select(0, indices.flatten()).view(*indices.shape, *tensor.shape[1:]).transpose(1, 2)


AttentionInterface.register(ATTENTION_IMPLEMENTATION, shared_attention)
AttentionMaskInterface.register(ATTENTION_IMPLEMENTATION, sdpa_mask)
