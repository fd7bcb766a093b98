"""Attention over a packed sequence: each suffix attends to what precedes it in its row, not to other suffixes.

It is registered with transformers as an attention implementation. If `packed_attention` is None, it calls ``sdpa``.
There are two ways to compute it, with equal results up to rounding:

- `SegmentedAttention` computes no scores between suffixes and copies each prefix once per suffix. It is faster on a
  CPU, where the number of operations decides.
- `GroupedAttention` computes the scores between all suffixes of a prefix, masks them, and copies no prefix. It is
  faster on a GPU: steps of LLaVA-1.5-7B with 16 questions on 4 images take 0.79 of the time and 0.82 of the memory of
  `SegmentedAttention` on an H100.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION_IMPLEMENTATION = "shared_image"  # the name under which transformers finds `shared_attention`
WIDTH_MULTIPLE = 8  # GPU kernels copy a mask whose width is not a multiple of this


@dataclass(frozen=True)
class Segments:
    """The segments of a packed sequence of N positions: the root, and G prefixes, each followed by its suffixes.

    A row of the unpacked batch is the root, a prefix and possibly one of its suffixes. A row that shares nothing is a
    prefix.
    """

    prefix: Tensor  # [N] the number of the prefix, 0, 1, ... in this order, or -1 within the root, which comes first
    suffix: Tensor  # [N] 0 within the root or a prefix, or 1, 2, ... within the suffixes of a prefix
    is_padding: Tensor  # [N] bool, padding whose outputs are used. Nothing attends to it. Only suffixes end with it.

    @property
    def root_length(self) -> int:
        """The number of positions of the root."""
        return int((self.prefix < 0).sum())

    def to(self, device: torch.device) -> Segments:
        """Returns a copy on a device."""
        return Segments(self.prefix.to(device), self.suffix.to(device), self.is_padding.to(device))


class PackedAttention(ABC):
    """The attention of a packed sequence of N positions with G prefixes.

    Its subclasses are data classes whose tensors `to` moves.
    """

    @classmethod
    @abstractmethod
    def build(cls, segments: Segments) -> Self:
        """Describes a packed sequence.

        Args:
            segments: Its segments, on the CPU.
        """

    @abstractmethod
    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, queries_per_key: int, dropout: float, scaling: float | None
    ) -> Tensor:
        """Computes attention.

        Args:
            query: [N, heads, head_size].
            key: [N, heads / queries_per_key, head_size].
            value: [N, heads / queries_per_key, head_size].
            queries_per_key: The number of query heads per key head.
            dropout: Probability of dropping an attention weight.
            scaling: Factor on the attention scores. None uses ``1 / sqrt(head_size)``.

        Returns:
            [N, heads, head_size].
        """

    def to(self, device: torch.device) -> Self:
        """Returns a copy on a device."""
        return type(self)(
            **{name: value.to(device) if isinstance(value, Tensor) else value for name, value in vars(self).items()}
        )


@dataclass(frozen=True)
class SegmentedAttention(PackedAttention):
    """One call for all prefixes with the root, padded to S positions, and one for all R suffixes, padded to T."""

    prefixes: Tensor  # [G, S] indices into the packed sequence, those of the root in each row
    suffixes: Tensor  # [R, T] indices into the packed sequence
    prefix_of_suffix: Tensor  # [R] the number of each suffix's prefix
    attention_mask: Tensor  # [R, 1, T, S + T] bool, where a suffix attends: S positions of its prefix, T of itself
    inverse_index: Tensor  # [N] the index of each position in the concatenation of prefixes and suffixes, flattened

    @classmethod
    def build(cls, segments: Segments) -> Self:
        root_length = segments.root_length
        prefix, suffix = segments.prefix[root_length:], segments.suffix[root_length:]
        is_start = torch.ones_like(suffix, dtype=torch.bool)
        is_start[1:] = (prefix[1:] != prefix[:-1]) | (suffix[1:] != suffix[:-1])
        starts = is_start.nonzero()[:, 0]
        lengths = starts.diff(append=starts.new_tensor([len(suffix)])).tolist()
        is_suffix = suffix[starts] > 0
        root, rest = torch.arange(root_length), torch.arange(root_length, root_length + len(suffix))
        parts = list(zip(torch.split(rest, lengths), is_suffix.tolist(), strict=True))
        prefixes = pad_sequence(
            [torch.cat([root, indices]) for indices, of_suffix in parts if not of_suffix],
            batch_first=True,
            padding_value=-1,
        )
        suffix_list = [indices for indices, of_suffix in parts if of_suffix]
        suffixes = (
            pad_sequence(suffix_list, batch_first=True, padding_value=-1) if suffix_list else prefixes.new_zeros(0, 0)
        )
        prefix_of_suffix = prefix[starts[is_suffix]]
        suffix_length = suffixes.shape[1]
        prefix_mask = (prefixes >= 0)[prefix_of_suffix][:, None, :].expand(-1, suffix_length, -1)
        causal_mask = torch.ones(suffix_length, suffix_length, dtype=torch.bool).tril()
        # Padding after a suffix attends to the suffix itself, so that its outputs are numbers. Nobody reads them.
        is_key = ~segments.is_padding[suffixes.clamp(min=0)] | (suffixes < 0)
        concatenated = torch.cat([prefixes.flatten(), suffixes.flatten()])
        inverse_index = torch.empty_like(segments.suffix)
        inverse_index[concatenated[concatenated >= 0]] = (concatenated >= 0).nonzero()[:, 0]
        inverse_index[:root_length] = root  # of the first row, since all rows contain the root
        return cls(
            prefixes=prefixes.clamp(min=0),
            suffixes=suffixes.clamp(min=0),
            prefix_of_suffix=prefix_of_suffix,
            attention_mask=torch.cat([prefix_mask, causal_mask & is_key[:, None, :]], dim=2)[:, None],
            inverse_index=inverse_index,
        )

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, queries_per_key: int, dropout: float, scaling: float | None
    ) -> Tensor:
        prefix_queries, *prefix_keys_values = (_gather(tensor, self.prefixes) for tensor in (query, key, value))
        keys, values = (repeat_kv(tensor, queries_per_key) for tensor in prefix_keys_values)
        attended = F.scaled_dot_product_attention(
            prefix_queries, keys, values, dropout_p=dropout, is_causal=True, scale=scaling
        )
        outputs = [attended.transpose(1, 2).flatten(0, 1)]
        if len(self.suffixes):
            keys, values = (
                repeat_kv(
                    torch.cat([prefix.index_select(0, self.prefix_of_suffix), _gather(tensor, self.suffixes)], dim=2),
                    queries_per_key,
                )
                for prefix, tensor in zip(prefix_keys_values, (key, value), strict=True)
            )
            suffix_queries = _gather(query, self.suffixes)
            attended = F.scaled_dot_product_attention(
                suffix_queries, keys, values, attn_mask=self.attention_mask, dropout_p=dropout, scale=scaling
            )
            outputs.append(attended.transpose(1, 2).flatten(0, 1))
        return torch.cat(outputs).index_select(0, self.inverse_index)


@dataclass(frozen=True)
class GroupedAttention(PackedAttention):
    """One call in which the root and each prefix with its suffixes are a row, padded to L positions."""

    rows: Tensor  # [G, L] indices into the packed sequence. Padding points to the positions after the row.
    attention_mask: Tensor  # [G, 1, L, L] bool, the positions that each position attends to
    inverse_index: Tensor  # [N] the index of each position in the flattened rows
    root_length: int

    @classmethod
    def build(cls, segments: Segments) -> Self:
        root_length = segments.root_length
        prefix, suffix = segments.prefix[root_length:], segments.suffix[root_length:]
        counts = prefix.bincount()
        starts = counts.cumsum(dim=0) - counts
        offsets = root_length + torch.arange(len(prefix)) - starts[prefix]  # the position of each token in its row
        row_length = -(-(root_length + int(counts.max())) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
        suffixes = torch.full((len(counts), row_length), -1)  # [G, L] like `suffix`, -1 on padding
        suffixes[:, :root_length] = 0
        suffixes[prefix, offsets] = suffix
        is_key = torch.ones(len(counts), row_length, dtype=torch.bool)
        is_key[prefix, offsets] = ~segments.is_padding[root_length:]
        is_visible = (suffixes[:, None, :] == 0) | (suffixes[:, None, :] == suffixes[:, :, None])
        causal_mask = torch.ones(row_length, row_length, dtype=torch.bool).tril()
        rows = (starts[:, None] + torch.arange(row_length)) % (root_length + len(prefix))
        rows[:, :root_length] = torch.arange(root_length)
        return cls(
            rows=rows,
            attention_mask=(is_visible & causal_mask & is_key[:, None, :])[:, None],
            inverse_index=torch.cat([torch.arange(root_length), prefix * row_length + offsets]),
            root_length=root_length,
        )

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, queries_per_key: int, dropout: float, scaling: float | None
    ) -> Tensor:
        queries, keys, values = (
            _ToRows.apply(tensor, self.rows, self.inverse_index, self.root_length).transpose(1, 2)  # type: ignore[no-untyped-call]
            for tensor in (query, key, value)
        )
        attended = F.scaled_dot_product_attention(
            queries,
            repeat_kv(keys, queries_per_key),
            repeat_kv(values, queries_per_key),
            attn_mask=self.attention_mask,
            dropout_p=dropout,
            scale=scaling,
        )
        output: Tensor = _FromRows.apply(attended.transpose(1, 2), self.inverse_index)  # type: ignore[no-untyped-call]
        return output


class _ToRows(torch.autograd.Function):
    """Copies positions [N, ...] to rows [G, L, ...]. The gradients of padding are zero and therefore not added.

    The gradient of ``index_select`` would add them with atomic operations, which takes 4 % of a step on a GPU.
    """

    @staticmethod
    def forward(ctx: Any, positions: Tensor, rows: Tensor, inverse_index: Tensor, root_length: int) -> Tensor:
        ctx.save_for_backward(inverse_index)
        ctx.root_length = root_length
        return positions.index_select(0, rows.flatten()).view(*rows.shape, *positions.shape[1:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse_index,) = ctx.saved_tensors
        gradient = gradients[0].flatten(0, 1).index_select(0, inverse_index)
        if ctx.root_length:  # all rows start with the root
            gradient[: ctx.root_length] = gradients[0][:, : ctx.root_length].sum(dim=0)
        return gradient, None, None, None


class _FromRows(torch.autograd.Function):
    """Copies rows [G, L, ...] back to positions [N, ...]. The gradients of padding are zero."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, inverse_index: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_index)
        ctx.shape = rows.shape
        return rows.flatten(0, 1).index_select(0, inverse_index)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (inverse_index,) = ctx.saved_tensors
        gradient = gradients[0].new_zeros(ctx.shape)
        gradient.flatten(0, 1).index_copy_(0, inverse_index, gradients[0])
        return gradient, None


def describe_packed_sequence(segments: Segments, device: torch.device) -> PackedAttention:
    """Returns the description of a packed sequence for the kind of attention that is faster on a device."""
    kind: type[PackedAttention] = SegmentedAttention if device.type == "cpu" else GroupedAttention
    return kind.build(segments).to(device)


def shared_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packed_attention: PackedAttention | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Computes attention with the signature of transformers' attention functions.

    Args:
        module: The attention layer. Its `num_key_value_groups` is the number of query heads per key head.
        query: [1, heads, N, head_size].
        key: [1, key heads, N, head_size].
        value: [1, key heads, N, head_size].
        attention_mask: Ignored if `packed_attention` is set.
        dropout: Probability of dropping an attention weight.
        scaling: Factor on the attention scores. None uses ``1 / sqrt(head_size)``.
        packed_attention: The description of a packed sequence. None calls SDPA with the mask.

    Returns:
        ``([1, N, heads, head_size], None)``, without attention weights.
    """
    if packed_attention is None:
        output: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output
    queries_per_key = getattr(module, "num_key_value_groups", 1)
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    return packed_attention.attend(query, key, value, queries_per_key, dropout, scaling)[None], None


def _gather(tensor: Tensor, indices: Tensor) -> Tensor:
    """Returns [P, heads, S, head_size]: the entries of a tensor [N, heads, head_size] at indices [P, S]."""
    return tensor.index_select(0, indices.flatten()).view(*indices.shape, *tensor.shape[1:]).transpose(1, 2)


AttentionInterface.register(ATTENTION_IMPLEMENTATION, shared_attention)
AttentionMaskInterface.register(ATTENTION_IMPLEMENTATION, sdpa_mask)
