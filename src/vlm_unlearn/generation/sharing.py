"""Runs what the prompts of a batch begin with alike once: an image with the text around it, and a prompt that has several answers.

Two prefills fill the cache that `generate` goes on from: one of each shared beginning, whose rows are then dealt out to the prompts,
and one of what each prompt has of its own. A beginning is padded on the left, and so is the rest behind it. The mask hides the gap and
positions don't count it, so that each prompt is what it is alone, up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from vlm_unlearn.data.encoding import Batch, Processor, Turn, encode, move, render, token_ids
from vlm_unlearn.generation.cache import preallocated_cache
from vlm_unlearn.models.layout import LAYOUTS, get_base_model

TOKENS = (
    "input_ids",
    "attention_mask",
    "mm_token_type_ids",
)  # what the processor makes of text; the rest is the images'


@dataclass(frozen=True)
class Prefilled:
    """Prompts, one a row, all but the last token of each in the cache."""

    ids: Tensor  # [B, S]
    mask: Tensor  # [B, S] 0 on padding
    positions: Tensor  # [B, S], or [3, B, S] where the family has several axes
    cache: DynamicCache  # [B] rows of S - 1 positions

    def append_tokens(self, new: Tensor, rows: Tensor) -> Prefilled:
        """Some of the rows, by number, with the new tokens [B, N] behind them; all but the last are in the cache already."""
        on = torch.arange(1, new.shape[1] + 1, device=new.device)
        positions = torch.cat([self.positions, self.positions[..., -1:] + on], dim=-1)
        _deal_out(self.cache, rows, len(self.ids))
        ids, mask = torch.cat([self.ids, new], dim=1), torch.cat([self.mask, torch.ones_like(new)], dim=1)
        return Prefilled(ids[rows], mask[rows], positions[..., rows, :], self.cache)


def prefill(
    model: Any, processor: Processor, turns: Sequence[Turn], rows: Sequence[int], max_new_tokens: int
) -> Prefilled | None:
    """Prefills the prompts of distinct turns, or does nothing where the model can't share what they begin with.

    That takes a family whose positions are ours to give. A sliding window must be as long as prompts and answers, since it would count
    the gaps.

    Args:
        rows: the turn of each row, by number: a turn has as many rows as it is to have answers.

    Raises:
        UserError: a turn can't be encoded; it is named.
    """
    inner: Any = get_base_model(model)
    layout = LAYOUTS.get(str(inner.config.model_type))
    if layout is None or not layout.supports_prefix_sharing:
        return None
    encoded = _encode(processor, turns, inner.config.image_token_id)
    if encoded is None:
        return None
    prompts, groups, images = encoded
    ids, mask, shared = lay_out(prompts, groups, processor.tokenizer.pad_token_id)
    cache = preallocated_cache(inner.config.get_text_config(decoder=True))
    if any(layer.is_sliding and ids.shape[1] + max_new_tokens > layer.sliding_window for layer in cache.layers):
        return None
    ids, mask, images = ids.to(inner.device), mask.to(inner.device), move(images, inner.device, inner.dtype)
    positions = _positions(inner, ids, mask, groups, images)

    def run(chosen: Sequence[int], start: int, end: int, **seen: Tensor) -> None:
        inner(
            input_ids=ids[chosen, start:end],
            attention_mask=mask[chosen, :end],
            position_ids=positions[..., chosen, start:end],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **seen,
        )

    width = ids.shape[1] - 1  # `generate` runs the last token, and asks for what comes next
    if shared:
        run([groups.index(group) for group in range(max(groups) + 1)], 0, shared, **images)
        _deal_out(cache, torch.tensor(groups, device=ids.device), max(groups) + 1)
    if width > shared:
        run(range(len(turns)), shared, width)
    chosen = torch.tensor(rows, device=ids.device)
    _deal_out(cache, chosen, len(turns))
    return Prefilled(ids[chosen], mask[chosen], positions[..., chosen, :], cache)


def _deal_out(cache: DynamicCache, numbers: Tensor, count: int) -> None:
    """Makes row `numbers[n]` of a cache of `count` rows its row n; it is copied, unless nothing changes."""
    if numbers.tolist() != list(range(count)):
        cache.batch_select_indices(numbers)


def _encode(
    processor: Processor, turns: Sequence[Turn], image_token: int
) -> tuple[list[list[int]], list[int], Batch] | None:
    """The tokens of each prompt, its group, and what the processor makes of the images, each once.

    A group has an image and what stands before it in common; prompts without an image are one group. None where the processor changes
    the text behind the image.
    """
    bare = [token_ids(processor, render(processor, turn).text) for turn in turns]  # an image is a single token here
    behind = [_behind(ids, image_token) for ids in bare]
    numbers: dict[tuple[object, ...], int] = {}
    groups = [
        numbers.setdefault((turn.image, *ids[:end]), len(numbers))
        for turn, ids, end in zip(turns, bare, behind, strict=True)
    ]
    firsts = [groups.index(group) for group in range(len(numbers))]
    encoded = encode(processor, [turns[row] for row in firsts], padding_side="right")
    heads = []
    for row, padded, real in zip(firsts, encoded["input_ids"], encoded["attention_mask"].bool(), strict=True):
        ids, text = padded[real].tolist(), bare[row][behind[row] :]
        end = len(ids) - len(text)  # an image's tokens may be followed by others that close it
        if ids[end:] != text:
            return None
        heads.append(ids[:end])
    prompts = [heads[group] + ids[end:] for group, ids, end in zip(groups, bare, behind, strict=True)]
    return prompts, groups, {name: value for name, value in encoded.items() if name not in TOKENS}


def _behind(ids: Sequence[int], image_token: int) -> int:
    """How many tokens there are up to the last one of an image, and with it; 0 without an image."""
    return next((end for end in range(len(ids), 0, -1) if ids[end - 1] == image_token), 0)


def lay_out(prompts: Sequence[Sequence[int]], groups: Sequence[int], padding: int) -> tuple[Tensor, Tensor, int]:
    """Prompts [B, S] and their mask, the first `shared` columns the beginnings that the prompts of a group have in common.

    The last token of a prompt is never in its beginning.

    Example:
        prompts [[1, 2, 3, 4], [1, 2, 5], [6, 7]] of groups [0, 0, 1] are, with 0 for padding and two columns shared,
        [[1, 2, 3, 4], [1, 2, 0, 5], [0, 6, 0, 7]]
    """
    members: dict[int, list[Sequence[int]]] = {}
    for group, prompt in zip(groups, prompts, strict=True):
        members.setdefault(group, []).append(prompt)
    common = {group: _common(found) for group, found in members.items()}
    shared = max(common.values())
    width = shared + max(len(prompt) - common[group] for group, prompt in zip(groups, prompts, strict=True))
    ids = torch.full((len(prompts), width), padding)
    mask = torch.zeros_like(ids)
    for row, (group, prompt) in enumerate(zip(groups, prompts, strict=True)):
        cut = common[group]
        ids[row, shared - cut : shared], ids[row, width - len(prompt) + cut :] = (
            torch.tensor(prompt[:cut]),
            torch.tensor(prompt[cut:]),
        )
        mask[row, shared - cut : shared] = mask[row, width - len(prompt) + cut :] = 1
    return ids, mask, shared


def _common(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that all begin with, less than any has."""
    limit = min(map(len, prompts)) - 1
    return next((place for place in range(limit) if len({prompt[place] for prompt in prompts}) > 1), limit)


def _positions(inner: Any, ids: Tensor, mask: Tensor, groups: Sequence[int], images: Batch) -> Tensor:
    """[B, S] or, where the family has several axes, [3, B, S]; padding isn't counted."""
    if "image_grid_thw" not in images:
        return (mask.cumsum(dim=1) - 1).clamp(min=0)
    seen = ids == inner.config.image_token_id
    with_image = [group for group in range(max(groups) + 1) if seen[groups.index(group)].any()]
    grids = images["image_grid_thw"][[with_image.index(group) for group in groups if group in with_image]]
    found: Tensor = inner.model.get_rope_index(ids, seen.int(), image_grid_thw=grids, attention_mask=mask)[0]
    return found
