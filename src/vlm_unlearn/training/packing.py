"""Packs questions on one image into one sequence: the image and what stands before the questions is run once for all of them.

A packed sequence is the shared beginning followed by each question's own rest. A mask lets every rest see the beginning and itself, and
positions count on from the beginning, so that each question sees exactly what it sees alone: loss and gradients are the same up to
rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlm_unlearn.data.batching import Batch
from vlm_unlearn.methods import Method
from vlm_unlearn.models.layout import layout_of

NO_IMAGE = -1  # the image key of a row without one
WORTH = 0.9  # of a batch's positions at most, or packing it isn't worth its mask
TAKES_MASKS = ("eager", "sdpa", "flex_attention")  # attention that lets us say which position sees which

Pack = tuple[Sequence[int], int]  # rows of one sequence, and how many of their tokens are shared


def why_not_packed(model: nn.Module, method: Method, attention: str) -> str | None:
    """What keeps questions on one image from sharing it, in a few words; None where they do.

    Args:
        model: of transformers, no wrapper around it.
        attention: transformers' name of how attention is computed.
    """
    if not layout_of(model).packs:
        return f"not with models of the family {model.config.model_type}"  # type: ignore[union-attr]
    if attention not in TAKES_MASKS:
        return f"not with {attention}"
    if method.paper and (method.hidden_layers or method.whole_logits):
        return "not with paper: true, which counts padding"  # of which packed sequences have none
    return None


@dataclass(frozen=True)
class Packing:
    """Where each position of a batch stands in its packed form."""

    place: Tensor  # [B, S] sequence * L + position, 0 for padding
    first: Tensor  # [P] the row that each packed sequence takes its image from
    segment: Tensor  # [P, L] 0 on the shared beginning, 1, 2, ... on the rests, -1 on padding

    @property
    def shape(self) -> tuple[int, int]:
        """Packed sequences and their length ``(P, L)``."""
        return self.segment.shape[0], self.segment.shape[1]

    def pack(self, values: Tensor, real: Tensor) -> Tensor:
        """[P, L, ...] of a tensor [B, S, ...]; zeros on padding.

        Args:
            real: [B, S] bool, False on padding.
        """
        sequences, length = self.shape
        packed = values.new_zeros(sequences * length, *values.shape[2:])
        packed[self.place[real]] = values[real]
        return packed.view(sequences, length, *values.shape[2:])

    def unpack(self, packed: Tensor) -> Tensor:
        """[B, S, ...] of a packed tensor [P, L, ...]; what stands on padding means nothing."""
        return packed.flatten(0, 1)[self.place]

    def mask(self, dtype: torch.dtype) -> Tensor:
        """[P, 1, L, L] what is added to the attention scores: 0 where a position sees another, else the lowest number.

        Padding sees padding, since a row that sees nothing gives NaN; a bool mask would be misread by eager attention.
        """
        length = self.segment.shape[1]
        earlier = torch.ones(length, length, dtype=torch.bool, device=self.segment.device).tril()
        allowed = _sees(earlier, self.segment[:, :, None], self.segment[:, None, :])
        return torch.where(allowed, 0.0, torch.finfo(dtype).min).to(dtype)[:, None]

    def block_mask(self) -> Any:
        """The same for FlexAttention, a BlockMask: blocks in which no position sees another are not computed."""
        from torch.nn.attention.flex_attention import create_block_mask

        def sees(sequence: Tensor, _head: Tensor, by: Tensor, seen: Tensor) -> Tensor:
            return _sees(by >= seen, self.segment[sequence, by], self.segment[sequence, seen])

        sequences, length = self.shape
        return create_block_mask(sees, sequences, None, length, length, device=str(self.segment.device))


def _sees(earlier: Tensor, by: Tensor, seen: Tensor) -> Tensor:
    """Whether a position of one segment sees one of another: what is earlier, on the shared beginning or in its own rest."""
    return earlier & ((seen == 0) | (seen == by))


def find_packing(ids: Tensor, real: Tensor, images: Tensor, image_token: int) -> Packing | None:
    """How to pack a batch, or None where that would save little.

    Args:
        ids: [B, S] token ids, padded on the right.
        real: [B, S] bool, False on padding.
        images: [B] the same number for the same image, `NO_IMAGE` for none.
        image_token: the id of an image's tokens; rows that share an image but have text before it that differs stay apart.
    """
    keys, lengths = images.tolist(), real.sum(dim=1).tolist()
    rows_of: dict[int, list[int]] = {}
    for row, key in enumerate(keys):
        rows_of.setdefault(key if key != NO_IMAGE else -2 - row, []).append(row)
    if len(rows_of) == len(keys):
        return None
    groups: list[Pack] = []
    for rows in rows_of.values():
        shared = _shared(ids, rows, lengths) if len(rows) > 1 else 0
        whole = all(int((ids[row, :shared] == image_token).sum()) == int((ids[row] == image_token).sum()) for row in rows)
        groups += [(rows, shared)] if len(rows) > 1 and whole else [([row], 0) for row in rows]
    packs = _cut(groups, lengths)
    return _lay_out(ids, packs, lengths) if _cells(packs, lengths) <= WORTH * ids.numel() else None


def _cut(groups: Sequence[Pack], lengths: Sequence[int]) -> list[Pack]:
    """Cuts groups to a length at which the fewest positions are computed, padding included: one group of many questions would make the
    sequences of all others as long as its own."""
    limits: set[int] = set()
    for rows, shared in groups:
        limits.update(_length((rows[: count + 1], shared), lengths) for count in range(len(rows)))
    return min(
        ([part for group in groups for part in _parts(group, limit, lengths)] for limit in sorted(limits)),
        key=lambda packs: _cells(packs, lengths),
    )


def _parts(group: Pack, limit: int, lengths: Sequence[int]) -> list[Pack]:
    """A group as sequences that are no longer than the limit, or hold a single row."""
    rows, shared = group
    parts: list[list[int]] = []
    for row in rows:
        if parts and _length(([*parts[-1], row], shared), lengths) <= limit:
            parts[-1].append(row)
        else:
            parts.append([row])
    return [(part, shared if len(part) > 1 else 0) for part in parts]


def _length(pack: Pack, lengths: Sequence[int]) -> int:
    rows, shared = pack
    return shared + sum(lengths[row] - shared for row in rows)


def _cells(packs: Sequence[Pack], lengths: Sequence[int]) -> int:
    return len(packs) * max(_length(pack, lengths) for pack in packs)


def _shared(ids: Tensor, rows: Sequence[int], lengths: Sequence[int]) -> int:
    """Tokens that all rows begin with, less than any row has."""
    limit = min(lengths[row] for row in rows) - 1
    alike = (ids[list(rows), :limit] == ids[rows[0], :limit]).all(dim=0)
    return limit if bool(alike.all()) else int((~alike).int().argmax())


def _lay_out(ids: Tensor, packs: Sequence[Pack], lengths: Sequence[int]) -> Packing:
    length = max(_length(pack, lengths) for pack in packs)
    place = torch.zeros_like(ids)
    segment = torch.full((len(packs), length), -1, dtype=torch.long, device=ids.device)
    for number, (rows, shared) in enumerate(packs):
        start = number * length
        segment[number, :shared] = 0
        end = shared
        for own, row in enumerate(rows, start=1):
            rest = lengths[row] - shared
            place[row, :shared] = torch.arange(start, start + shared, device=ids.device)
            place[row, shared : lengths[row]] = torch.arange(start + end, start + end + rest, device=ids.device)
            segment[number, end : end + rest] = own
            end += rest
    first = torch.tensor([rows[0] for rows, _ in packs], device=ids.device)
    return Packing(place, first, segment)


def packed_batch(batch: Batch, packing: Packing, images: Tensor, positions: Tensor, mask: Any) -> dict[str, Any]:
    """The model's inputs for the packed sequences: tokens packed, each image once.

    Args:
        batch: the unpacked inputs; where ``image_grid_thw`` [images, 3] is among them, ``pixel_values`` has a row a patch, else an image.
        images: [B] image keys.
        positions: [B, S] or [3, B, S] position ids of the unpacked batch.
        mask: the packing's own, in the form that the attention takes.
    """
    real = batch["attention_mask"].bool()
    with_image = images != NO_IMAGE
    kept = (with_image.cumsum(dim=0) - 1)[packing.first[with_image[packing.first]]]  # numbers of the images that stay
    packed = {"attention_mask": mask}
    for name, value in batch.items():
        if name == "pixel_values" and "image_grid_thw" in batch:
            parts = torch.split(value, batch["image_grid_thw"].prod(dim=-1).tolist())
            packed[name] = torch.cat([parts[number] for number in kept.tolist()])
        elif name == "pixel_values" or value.shape[:2] != real.shape:
            packed[name] = value[kept]
        elif name != "attention_mask":
            packed[name] = packing.pack(value, real)
    axes = positions if positions.dim() == 3 else positions[None]
    together = torch.stack([packing.pack(axis, real) for axis in axes])
    packed["position_ids"] = together if positions.dim() == 3 else together[0]
    return packed
