"""Prefix sharing: packs the rows of a batch into one sequence, so that what they have in common runs once.

The packed sequence starts with the root: the tokens with which all rows start, such as a system prompt. Then it
contains, for each image, the prefix that its questions share (the image and the text before the questions), followed by
the suffix of each question. Each suffix attends to the root, its own prefix and causally to itself, and position ids
continue from the prefix. Every question therefore gets the same attention as in an unpacked batch, and loss and
gradients are equal up to rounding. With dropout, the rows share the dropout masks of what they have in common.

Padding is left out, unless the loss uses its outputs (see `packing_of`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlm_unlearn.data.encoding import Batch
from vlm_unlearn.modeling.shared_attention import (
    ATTENTION_IMPLEMENTATION,
    PackedAttention,
    Segments,
    describe_packed_sequence,
)
from vlm_unlearn.modeling.vlm import VisionLanguageModel

NO_IMAGE = -1  # the image key of a row without an image
MAX_PACKED_FRACTION = 0.9  # pack only if the packed sequence is at most 90 % of the padded batch
MIN_ROOT_LENGTH = 8  # tokens, below which a common start of all rows is not worth the work
SUPPORTED_ATTENTION = ("sdpa", ATTENTION_IMPLEMENTATION, "flex_attention")


@dataclass(frozen=True)
class _PrefixGroup:
    """Rows of a batch that start with the same tokens."""

    rows: Sequence[int]
    prefix_length: int  # the length of the only row if there is one


def prefix_sharing_unsupported_reason(vlm: VisionLanguageModel, attention: str) -> str | None:
    """Returns in a few words why questions on one image cannot share it, or None if they can.

    Args:
        vlm: The model.
        attention: transformers' name of the attention implementation.
    """
    if not vlm.supports_prefix_sharing:
        return vlm.prefix_sharing_obstacle
    if attention not in SUPPORTED_ATTENTION:
        return f"not with {attention}"
    return None


@dataclass(frozen=True)
class Packing:
    """Maps the positions of a batch [B, S] to a packed sequence of N positions with G prefixes."""

    packed_index: Tensor  # [B, S] the packed position of each position, arbitrary where it is left out
    is_packed: Tensor  # [B, S] bool, False on padding that is left out
    image_rows: Tensor  # [G] the row whose image each prefix uses
    segments: Segments  # of the N positions
    attention: PackedAttention  # the same segments as `shared_attention` uses them

    def pack(self, values: Tensor) -> Tensor:
        """Packs a tensor [B, S, ...] into [1, N, ...]."""
        packed = values.new_zeros(len(self.segments.prefix), *values.shape[2:])
        packed[self.packed_index[self.is_packed]] = values[self.is_packed]
        return packed[None]

    def unpack(self, packed: Tensor) -> Tensor:
        """Unpacks a tensor [1, N, ...] into [B, S, ...]. Entries of positions that were left out are meaningless."""
        unpacked: Tensor = packed[0][self.packed_index]
        return unpacked

    def block_mask(self) -> Any:
        """Returns the same attention pattern as a BlockMask for FlexAttention, which skips fully masked blocks."""
        from torch.nn.attention.flex_attention import create_block_mask

        prefix, suffix, is_padding = self.segments.prefix, self.segments.suffix, self.segments.is_padding

        def attends(_sequence: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            in_row = (prefix[query] == prefix[key]) & ((suffix[key] == 0) | (suffix[key] == suffix[query]))
            return (query >= key) & (in_row | (prefix[key] < 0)) & ~is_padding[key]

        return create_block_mask(attends, 1, None, len(prefix), len(prefix), device=str(prefix.device))


def packing_of(vlm: VisionLanguageModel, batch: Batch, widths: Sequence[int] | None = None) -> Packing | None:
    """Returns how the rows of a batch share what they have in common, or None if they do not.

    Args:
        vlm: The model.
        batch: A batch padded on the right. Its ``images`` [B] contains a key for each image.
        widths: The number of positions of each row whose outputs are used, at least its number of tokens. None uses
            no outputs of padding.
    """
    if "images" not in batch or prefix_sharing_unsupported_reason(vlm, vlm.attn_implementation) is not None:
        return None
    if vlm.sliding_window and batch["input_ids"].shape[1] > vlm.sliding_window:
        return None  # a sliding window would count the positions of the packed sequence
    is_token = batch["attention_mask"].bool()
    return find_packing(batch["input_ids"], is_token, batch["images"], vlm.image_token_id, widths)


def find_packing(
    ids: Tensor, is_token: Tensor, images: Tensor, image_token: int, widths: Sequence[int] | None = None
) -> Packing | None:
    """Returns how to pack a batch, or None if that would save less than a tenth of its positions.

    Args:
        ids: [B, S] token ids, padded on the right.
        is_token: [B, S] bool, False on padding.
        images: [B] the same number for the same image, `NO_IMAGE` for none.
        image_token: The id of an image's tokens. Rows on one image stay separate if the text before the image differs.
        widths: The number of positions of each row that are packed, at least its number of tokens. None packs no
            padding.
    """
    device = ids.device
    # On the CPU: the many small lookups below would each synchronize with a GPU.
    ids, keys, lengths = ids.cpu(), images.tolist(), is_token.sum(dim=1).tolist()
    widths = lengths if widths is None else widths
    root_length = _root_length(ids, lengths, image_token)
    rows_by_image: dict[int, list[int]] = {}
    for row, key in enumerate(keys):
        rows_by_image.setdefault(key if key != NO_IMAGE else -2 - row, []).append(row)
    groups: list[_PrefixGroup] = []
    for rows in rows_by_image.values():
        prefix_length = _common_prefix_length(ids, rows, lengths) if len(rows) > 1 else 0
        image_in_prefix = all(
            int((ids[row, :prefix_length] == image_token).sum()) == int((ids[row] == image_token).sum()) for row in rows
        )
        if len(rows) > 1 and image_in_prefix:
            groups.append(_PrefixGroup(rows, prefix_length))
        else:
            groups.extend(_PrefixGroup([row], lengths[row]) for row in rows)
    size = root_length + sum(
        group.prefix_length - root_length + sum(widths[row] - group.prefix_length for row in group.rows)
        for group in groups
    )
    if size > MAX_PACKED_FRACTION * ids.numel():
        return None
    return _build_packing(ids, groups, root_length, lengths, widths, size, device)


def _root_length(ids: Tensor, lengths: Sequence[int], image_token: int) -> int:
    """Returns how many tokens all rows have in common at their start, up to the first image, 0 if these are few."""
    if len(ids) == 1:
        return 0
    length = _common_prefix_length(ids, range(len(ids)), lengths)
    images = (ids[:, :length] == image_token).any(dim=0).nonzero()
    length = int(images[0]) if len(images) else length
    return length if length >= MIN_ROOT_LENGTH else 0


def _common_prefix_length(ids: Tensor, rows: Sequence[int], lengths: Sequence[int]) -> int:
    """Returns how many tokens all rows have in common at their start, less than the length of any row."""
    limit = min(lengths[row] for row in rows) - 1
    equal = (ids[list(rows), :limit] == ids[rows[0], :limit]).all(dim=0)
    return limit if bool(equal.all()) else int((~equal).int().argmax())


def _build_packing(
    ids: Tensor,
    groups: Sequence[_PrefixGroup],
    root_length: int,
    lengths: Sequence[int],
    widths: Sequence[int],
    size: int,
    device: torch.device,
) -> Packing:
    """Assigns packed positions to the root, and then to the prefixes and suffixes of all groups, one after the other.

    Padding that is packed is a suffix of its own, or the end of one.
    """
    # What is left out is spread over all packed positions: a GPU would add the gradients of a single one one by one.
    packed_index = torch.arange(ids.numel()).view_as(ids) % size
    is_packed = torch.arange(ids.shape[1]) < torch.tensor(widths)[:, None]
    prefix, suffix = torch.full((size,), -1), torch.zeros(size, dtype=torch.long)
    is_padding = torch.zeros(size, dtype=torch.bool)
    positions = torch.arange(size)
    packed_index[:, :root_length] = positions[:root_length]
    end = root_length
    for group_number, group in enumerate(groups):
        start, prefix_length = end, group.prefix_length
        end += prefix_length - root_length
        prefix[start:] = group_number
        for suffix_number, row in enumerate(group.rows, start=1):
            stop = end + widths[row] - prefix_length
            packed_index[row, root_length:prefix_length] = positions[start : start + prefix_length - root_length]
            packed_index[row, prefix_length : widths[row]] = positions[end:stop]
            suffix[end:stop] = suffix_number
            is_padding[end + lengths[row] - prefix_length : stop] = True
            end = stop
    segments = Segments(prefix, suffix, is_padding)
    return Packing(
        packed_index.to(device),
        is_packed.to(device),
        torch.tensor([group.rows[0] for group in groups]).to(device),
        segments.to(device),
        describe_packed_sequence(segments, device),
    )


def packed_batch(batch: Batch, packing: Packing, images: Tensor, position_ids: Tensor, image_token: int) -> Batch:
    """Returns the model inputs of the packed sequence, except its attention mask. Each image occurs once.

    Args:
        batch: The unpacked inputs. ``pixel_values`` has one entry per image, one per sample (idefics3), one per patch
            (Qwen, whose batches contain ``image_grid_thw`` [images, 3]), or one per tile (InternVL).
        packing: The batch's packing.
        images: [B] image keys.
        position_ids: [B, S] or [3, B, S] position ids of the unpacked batch.
        image_token: The id of an image's tokens.
    """
    has_image = images != NO_IMAGE
    image_rows = packing.image_rows[has_image[packing.image_rows]]
    image_numbers = (has_image.cumsum(dim=0) - 1)[image_rows]
    packed: Batch = {}
    for name, value in batch.items():
        if name == "attention_mask":
            continue
        if value.shape[:2] == packing.packed_index.shape and not name.startswith("pixel_"):
            packed[name] = packing.pack(value)
        elif "pixel_attention_mask" in batch:  # idefics3 and smolvlm have an entry for each sample
            packed[name] = value[image_rows]
        elif len(value) == int(has_image.sum()):
            packed[name] = value[image_numbers]
        else:
            chunks = torch.split(value, _entries_per_image(batch, len(value), image_token, has_image))
            packed[name] = torch.cat([chunks[number] for number in image_numbers.tolist()])
    axes = position_ids if position_ids.dim() == 3 else position_ids[None]
    packed_axes = torch.stack([packing.pack(axis) for axis in axes])
    packed["position_ids"] = packed_axes if position_ids.dim() == 3 else packed_axes[0]
    return packed


def packed_inputs(vlm: VisionLanguageModel, batch: Batch, packing: Packing, images: Tensor) -> Batch:
    """Returns all model inputs of the packed sequence: those of `packed_batch`, and what restricts attention.

    Args:
        vlm: The model. Its attention implementation becomes one that supports packed sequences.
        batch: The unpacked inputs.
        packing: The batch's packing.
        images: [B] image keys.
    """
    attention = _attention_inputs(vlm, packing)
    return {**attention, **packed_batch(batch, packing, images, vlm.position_ids(batch), vlm.image_token_id)}


def _attention_inputs(vlm: VisionLanguageModel, packing: Packing) -> dict[str, Any]:
    """Returns the model inputs that restrict attention within a packed sequence."""
    if vlm.attn_implementation == "flex_attention":
        return {"attention_mask": packing.block_mask()}
    # Not reset afterwards: gradient checkpointing re-runs attention in backward. Unpacked batches fall through to SDPA.
    vlm.attn_implementation = ATTENTION_IMPLEMENTATION
    # transformers passes a mask of four dimensions on unchanged, and `shared_attention` ignores it.
    unused_mask = torch.zeros(1, 1, 1, 1, dtype=vlm.base_model.dtype, device=vlm.base_model.device)
    return {"attention_mask": unused_mask, "packed_attention": packing.attention}


def _entries_per_image(batch: Batch, entries: int, image_token: int, has_image: Tensor) -> list[int]:
    """Returns how many patches or tiles each image has."""
    if "image_grid_thw" in batch:
        patches: list[int] = batch["image_grid_thw"].prod(dim=-1).tolist()
        return patches
    # All tiles have the same number of tokens.
    tokens = (batch["input_ids"] == image_token).sum(dim=1)[has_image]
    return [count * entries // int(tokens.sum()) for count in tokens.tolist()]
