"""Packs questions on one image into one sequence: the image and what stands before the questions is run once for all of them.

The packed sequence has no padding: each image's shared beginning, followed by what each question on it has of its own. Attention lets a
rest see its beginning and itself, and positions count on from the beginning, so that each question sees exactly what it sees alone: loss
and gradients are the same up to rounding. (With dropout, what questions share is dropped for all of them alike.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from vlm_unlearn.data.encoding import Batch
from vlm_unlearn.methods import Method
from vlm_unlearn.models.layout import layout_of
from vlm_unlearn.training.shared_attention import NAME, Parts

NO_IMAGE = -1  # the image key of a row without one
WORTH = 0.9  # of a batch's positions at most, padding included, or packing it isn't worth its trouble
PACKS = ("sdpa", NAME, "flex_attention")  # attention that packed sequences can have

Pack = tuple[Sequence[int], int]  # rows of a batch, and how many tokens they begin with alike


def prefix_sharing_unsupported_reason(model: nn.Module, method: Method, attention: str) -> str | None:
    """What keeps questions on one image from sharing it, in a few words; None where they do.

    Args:
        model: of transformers, no wrapper around it.
        attention: transformers' name of how attention is computed.
    """
    if not layout_of(model).supports_prefix_sharing:
        return f"not with models of the family {model.config.model_type}"  # type: ignore[union-attr]
    if attention not in PACKS:
        return f"not with {attention}"
    if method.paper_compat and (method.hidden_layers or method.full_logit_roles):
        return "not with paper_compat: true, which counts padding"  # of which packed sequences have none
    return None


@dataclass(frozen=True)
class Packing:
    """Where each position of a batch stands in its packed form, a sequence of N positions."""

    place: Tensor  # [B, S], anywhere for padding
    first: Tensor  # [G] the row that each beginning takes its image from
    segment: Tensor  # [2, N] the number of the image, and 0 on its shared beginning, 1, 2, ... on the rests
    parts: Parts  # the same as `shared_attention` needs it

    def pack(self, values: Tensor, real: Tensor) -> Tensor:
        """[1, N, ...] of a tensor [B, S, ...].

        Args:
            real: [B, S] bool, False on padding.
        """
        packed = values.new_zeros(self.segment.shape[1], *values.shape[2:])
        packed[self.place[real]] = values[real]
        return packed[None]

    def unpack(self, packed: Tensor) -> Tensor:
        """[B, S, ...] of a packed tensor [1, N, ...]; what stands on padding means nothing."""
        found: Tensor = packed[0][self.place]
        return found

    def block_mask(self) -> Any:
        """The same for FlexAttention, a BlockMask: blocks in which no position sees another are not computed."""
        from torch.nn.attention.flex_attention import create_block_mask

        group, part = self.segment.unbind()

        def sees(_sequence: Tensor, _head: Tensor, by: Tensor, seen: Tensor) -> Tensor:
            return (by >= seen) & (group[by] == group[seen]) & ((part[seen] == 0) | (part[seen] == part[by]))

        return create_block_mask(sees, 1, None, len(part), len(part), device=str(part.device))


def find_packing(ids: Tensor, real: Tensor, images: Tensor, image_token: int) -> Packing | None:
    """How to pack a batch, or None where that would save little.

    Args:
        ids: [B, S] token ids, padded on the right.
        real: [B, S] bool, False on padding.
        images: [B] the same number for the same image, `NO_IMAGE` for none.
        image_token: the id of an image's tokens; rows that share an image but have text before it that differs stay apart.
    """
    device = ids.device
    ids, keys, lengths = (
        ids.cpu(),
        images.tolist(),
        real.sum(dim=1).tolist(),
    )  # many small questions, which a GPU would be asked one by one
    rows_of: dict[int, list[int]] = {}
    for row, key in enumerate(keys):
        rows_of.setdefault(key if key != NO_IMAGE else -2 - row, []).append(row)
    packs: list[Pack] = []
    for rows in rows_of.values():
        shared = _shared(ids, rows, lengths) if len(rows) > 1 else 0
        whole = all(
            int((ids[row, :shared] == image_token).sum()) == int((ids[row] == image_token).sum()) for row in rows
        )
        packs += [(rows, shared)] if len(rows) > 1 and whole else [([row], lengths[row]) for row in rows]
    size = sum(shared + sum(lengths[row] - shared for row in rows) for rows, shared in packs)
    return _lay_out(ids, packs, lengths, size, device) if size <= WORTH * ids.numel() else None


def _shared(ids: Tensor, rows: Sequence[int], lengths: Sequence[int]) -> int:
    """Tokens that all rows begin with, less than any row has."""
    limit = min(lengths[row] for row in rows) - 1
    alike = (ids[list(rows), :limit] == ids[rows[0], :limit]).all(dim=0)
    return limit if bool(alike.all()) else int((~alike).int().argmax())


def _lay_out(ids: Tensor, packs: Sequence[Pack], lengths: Sequence[int], size: int, device: torch.device) -> Packing:
    place = (
        torch.arange(ids.numel()).view_as(ids) % size
    )  # not one place for all padding, whose gradients a GPU would add one by one
    segment = torch.zeros(2, size, dtype=torch.long)
    every = torch.arange(size)
    end = 0
    for number, (rows, shared) in enumerate(packs):
        start = end
        end += shared
        segment[0, start:] = number
        for own, row in enumerate(rows, start=1):
            rest = lengths[row] - shared
            place[row, :shared] = every[start : start + shared]
            place[row, shared : lengths[row]] = every[end : end + rest]
            segment[1, end : end + rest] = own
            end += rest
    first = torch.tensor([rows[0] for rows, _ in packs])
    return Packing(place.to(device), first.to(device), segment.to(device), _parts(segment).to(device))


def _parts(segment: Tensor) -> Parts:
    group, part = segment.unbind()
    new = torch.ones_like(part, dtype=torch.bool)
    new[1:] = (segment[:, 1:] != segment[:, :-1]).any(dim=0)
    starts = new.nonzero()[:, 0]
    lengths = starts.diff(append=starts.new_tensor([len(part)])).tolist()
    places = list(zip(torch.split(torch.arange(len(part)), lengths), (part[starts] > 0).tolist(), strict=True))
    beginnings = pad_sequence([place for place, rest in places if not rest], batch_first=True, padding_value=-1)
    tails = [place for place, rest in places if rest]
    rests = pad_sequence(tails, batch_first=True, padding_value=-1) if tails else beginnings.new_zeros(0, 0)
    group = group[starts[part[starts] > 0]]
    width = rests.shape[1]
    before = (beginnings >= 0)[group][:, None, :].expand(-1, width, -1)
    own = torch.ones(width, width, dtype=torch.bool).tril().expand(len(rests), -1, -1)
    laid = torch.cat([beginnings.flatten(), rests.flatten()])
    back = torch.empty_like(part)
    back[laid[laid >= 0]] = (laid >= 0).nonzero()[:, 0]
    return Parts(beginnings.clamp(min=0), rests.clamp(min=0), group, torch.cat([before, own], dim=2)[:, None], back)


def packed_batch(batch: Batch, packing: Packing, images: Tensor, positions: Tensor) -> Batch:
    """The model's inputs for the packed sequence, but its mask: tokens packed, each image once.

    Args:
        batch: the unpacked inputs; where ``image_grid_thw`` [images, 3] is among them, ``pixel_values`` has a row a patch, else an image.
        images: [B] image keys.
        positions: [B, S] or [3, B, S] position ids of the unpacked batch.
    """
    real = batch["attention_mask"].bool()
    with_image = images != NO_IMAGE
    kept = (with_image.cumsum(dim=0) - 1)[packing.first[with_image[packing.first]]]  # numbers of the images that stay
    packed: Batch = {}
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
