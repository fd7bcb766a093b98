"""Prefix sharing for generation: prompts about the same image run their common prefix only once.

A batch often contains several questions about one image, or several samples of one prompt. Without sharing, each row
runs all image tokens again. :func:`prefill` fills the key-value cache in two passes instead:

1. **Prefix pass.** Prompts with the same image and the same tokens before it form a group. Their longest common prefix
   runs once per group. The cache rows are then copied to all prompts of the group.
2. **Suffix pass.** The remaining tokens run once per prompt, except the last token. The cache rows are then copied to
   all samples of the prompt.

``generate`` then runs the last token of each row, which predicts the first token of the answer.

For example, three prompts about two images I and J occupy these columns (``.`` is padding)::

    prefix    suffix
    sIIIIab   cde       prompt 0, image I after the start token s
    sIIIIab   ..f       prompt 1, image I
    .sJJJkl   ..m       prompt 2, image J: alone in its group, so its prefix is all but the last token

The prefix pass runs rows 0 and 2. The suffix pass runs ``cd`` and padding. ``generate`` runs the last column.

Prefixes and suffixes are both padded on the left. The attention mask hides the padding, and position ids do not count
it. Each prompt therefore gets the same result as in a batch of its own, up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from vlm_unlearn.data.encoding import Batch, Turn, encode, move, render, token_ids
from vlm_unlearn.data.processor_call import Processor
from vlm_unlearn.generation.cache import preallocated_cache
from vlm_unlearn.modeling.vlm import VisionLanguageModel

# The processor's outputs for text. Its other outputs belong to the images.
TEXT_INPUTS = ("input_ids", "attention_mask", "mm_token_type_ids")


@dataclass(frozen=True)
class Prefilled:
    """B rows whose tokens are in the cache, except for the last token of each row. A prompt has one row per sample."""

    input_ids: Tensor  # [B, S]
    attention_mask: Tensor  # [B, S], 0 on padding
    position_ids: Tensor  # [B, S], or [3, B, S] with images and multi-axis rotary embeddings (Qwen2.5-VL)
    cache: DynamicCache  # B rows of S - 1 positions

    def continue_rows(self, new_ids: Tensor, rows: Tensor) -> Prefilled:
        """Returns the selected rows with their generated tokens appended.

        The cache drops all other rows in place, so that this object must not be used afterwards.

        Args:
            new_ids: Tokens generated for every row, [B, N]. All but the last column are in the cache already.
            rows: Indices of the selected rows. Their answers must not have ended, since padding is not masked.
        """
        offsets = torch.arange(1, new_ids.shape[1] + 1, device=new_ids.device)
        input_ids = torch.cat([self.input_ids, new_ids], dim=1)
        attention_mask = torch.cat([self.attention_mask, torch.ones_like(new_ids)], dim=1)
        position_ids = torch.cat([self.position_ids, self.position_ids[..., -1:] + offsets], dim=-1)
        _select_cache_rows(self.cache, rows, len(self.input_ids))
        return Prefilled(input_ids[rows], attention_mask[rows], position_ids[..., rows, :], self.cache)


def prefill(
    model: Any, processor: Processor, turns: Sequence[Turn], turn_indices: Sequence[int], max_new_tokens: int
) -> Prefilled | None:
    """Runs prompts through the model with shared prefixes, ready for ``generate``.

    Args:
        model: The model, with or without PEFT adapters.
        processor: The model's processor.
        turns: P turns without an answer, the prompts. The suffixes of equal prompts would run twice.
        turn_indices: The index into `turns` of each of the B rows to return. A prompt has one row per sample.
        max_new_tokens: The number of tokens that will be generated at most.

    Returns:
        The prefilled prompts. None if the family does not support prefix sharing, if the processor changes the text
        after the image, or if a sliding attention window is shorter than the padded prompt plus `max_new_tokens` (the
        window counts the padding between prefix and suffix).

    Raises:
        UserError: A prompt cannot be encoded. The error contains its id.
    """
    vlm = VisionLanguageModel(model, processor)
    if not vlm.supports_prefix_sharing:
        return None
    inner = vlm.base_model  # without PEFT's wrapper, but with its adapters
    encoded = _encode_prompts(processor, turns, inner.config.image_token_id)
    if encoded is None:
        return None
    prompts, groups, images = encoded
    input_ids, attention_mask, prefix_width = align_prefixes(prompts, groups, processor.tokenizer.pad_token_id)
    cache = preallocated_cache(inner.config.get_text_config(decoder=True))
    width = input_ids.shape[1]
    if any(layer.is_sliding and width + max_new_tokens > layer.sliding_window for layer in cache.layers):
        return None
    input_ids, attention_mask = input_ids.to(inner.device), attention_mask.to(inner.device)
    images = move(images, inner.device, inner.dtype)
    position_ids = _position_ids(inner, input_ids, attention_mask, groups, images)

    def run_columns(rows: Sequence[int], start: int, end: int, **image_inputs: Tensor) -> None:
        inner(
            input_ids=input_ids[rows, start:end],
            attention_mask=attention_mask[rows, :end],
            position_ids=position_ids[..., rows, start:end],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,  # the logits are not used; 0 would compute all of them
            **image_inputs,
        )

    num_groups = max(groups) + 1
    if prefix_width:  # every image is in the prefix columns, since the template puts text after each image
        run_columns(_first_rows(groups), 0, prefix_width, **images)
        _select_cache_rows(cache, torch.tensor(groups, device=inner.device), num_groups)
    if width - 1 > prefix_width:
        run_columns(range(len(turns)), prefix_width, width - 1)
    rows = torch.tensor(turn_indices, device=inner.device)
    _select_cache_rows(cache, rows, len(turns))
    return Prefilled(input_ids[rows], attention_mask[rows], position_ids[..., rows, :], cache)


def _select_cache_rows(cache: DynamicCache, rows: Tensor, num_rows: int) -> None:
    """Makes the selected rows the rows of a cache, which has `num_rows` now. Rows can be repeated or dropped."""
    if rows.tolist() != list(range(num_rows)):
        cache.batch_select_indices(rows)


class _EncodedPrompts(NamedTuple):
    prompts: list[list[int]]  # the token ids of each prompt, with all tokens of its image
    groups: list[int]  # the group of each prompt, numbered from 0
    images: Batch  # the processor's outputs, such as pixel values, for the image of each group that has one


def _encode_prompts(processor: Processor, turns: Sequence[Turn], image_token_id: int) -> _EncodedPrompts | None:
    """Encodes prompts and groups them by image and by the tokens before it. Each group's image is processed once.

    The processor expands an image's placeholder in the text into all tokens of the image. It runs on the first prompt
    of each group only. The other prompts of the group get the same expanded tokens, followed by their own text. Prompts
    without an image form one group.

    Returns:
        None if the processor changes the text after an image, because then the tokens of the image cannot be separated
        from the text.
    """
    templated = [token_ids(processor, render(processor, turn).text) for turn in turns]  # an image is one token here
    image_ends = [_end_of_image(ids, image_token_id) for ids in templated]
    group_numbers: dict[tuple[object, ...], int] = {}
    groups = [
        group_numbers.setdefault((turn.image, *ids[:end]), len(group_numbers))  # images compare by path or content
        for turn, ids, end in zip(turns, templated, image_ends, strict=True)
    ]
    first_rows = _first_rows(groups)
    # The side of the padding does not matter, since the mask removes it.
    encoded = encode(processor, [turns[row] for row in first_rows], padding_side="right")
    expanded_images = []  # of each group: the tokens up to the end of the image, with all tokens of the image
    for row, padded_ids, mask in zip(first_rows, encoded["input_ids"], encoded["attention_mask"].bool(), strict=True):
        expanded_ids, ids_after_image = padded_ids[mask].tolist(), templated[row][image_ends[row] :]
        # Counted from the end: some processors add tokens after the image, which belong to it.
        image_end = len(expanded_ids) - len(ids_after_image)
        if expanded_ids[image_end:] != ids_after_image:
            return None
        expanded_images.append(expanded_ids[:image_end])
    prompts = [
        expanded_images[group] + ids[end:] for group, ids, end in zip(groups, templated, image_ends, strict=True)
    ]
    return _EncodedPrompts(prompts, groups, {name: value for name, value in encoded.items() if name not in TEXT_INPUTS})


def _end_of_image(ids: Sequence[int], image_token_id: int) -> int:
    """Returns the index after the last token of the image, or 0 if the prompt has no image."""
    return next((end for end in range(len(ids), 0, -1) if ids[end - 1] == image_token_id), 0)


def align_prefixes(
    prompts: Sequence[Sequence[int]], groups: Sequence[int], pad_token_id: int
) -> tuple[Tensor, Tensor, int]:
    """Pads prompts on the left of their prefix and of their suffix.

    The prefixes of all groups end at the same column, and so do all prompts. The prefix of a group is the longest that
    its prompts have in common. The last token of a prompt always belongs to its suffix.

    Args:
        prompts: The token ids of each prompt.
        groups: The group of each prompt.
        pad_token_id: The token id to pad with.

    Returns:
        The padded token ids [P, S], their attention mask [P, S], and the number of columns that contain prefixes.

    Example:
        The prompts ``[[1, 2, 3, 4], [1, 2, 5], [6, 7]]`` of groups ``[0, 0, 1]``, padded with 0, become
        ``[[1, 2, 3, 4], [1, 2, 0, 5], [0, 6, 0, 7]]`` with two prefix columns.
    """
    members: dict[int, list[Sequence[int]]] = {}
    for group, prompt in zip(groups, prompts, strict=True):
        members.setdefault(group, []).append(prompt)
    prefix_lengths = {group: _common_prefix_length(group_prompts) for group, group_prompts in members.items()}
    prefix_width = max(prefix_lengths.values())
    suffix_width = max(len(prompt) - prefix_lengths[group] for group, prompt in zip(groups, prompts, strict=True))
    width = prefix_width + suffix_width
    input_ids = torch.full((len(prompts), width), pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, (group, prompt) in enumerate(zip(groups, prompts, strict=True)):
        length = prefix_lengths[group]
        prefix_start, suffix_start = prefix_width - length, width - (len(prompt) - length)
        input_ids[row, prefix_start:prefix_width] = torch.tensor(prompt[:length])
        input_ids[row, suffix_start:] = torch.tensor(prompt[length:])
        attention_mask[row, prefix_start:prefix_width] = attention_mask[row, suffix_start:] = 1
    return input_ids, attention_mask, prefix_width


def _common_prefix_length(prompts: Sequence[Sequence[int]]) -> int:
    """Returns the length of the longest common prefix, but at least one token less than the shortest prompt."""
    limit = min(map(len, prompts)) - 1
    return next((index for index in range(limit) if len({prompt[index] for prompt in prompts}) > 1), limit)


def _first_rows(groups: Sequence[int]) -> list[int]:
    """Returns the index of each group's first prompt."""
    return [groups.index(group) for group in range(max(groups) + 1)]


def _position_ids(
    model: Any, input_ids: Tensor, attention_mask: Tensor, groups: Sequence[int], images: Batch
) -> Tensor:
    """Returns position ids [P, S], or [3, P, S] with images and multi-axis rotary embeddings. Padding not counted."""
    if "image_grid_thw" not in images:
        return (attention_mask.cumsum(dim=1) - 1).clamp(min=0)  # padding on the left would get -1
    is_image = input_ids == model.config.image_token_id
    groups_with_image = [group for group, row in enumerate(_first_rows(groups)) if is_image[row].any()]
    # `images` contains one grid per group with an image. `get_rope_index` expects one per prompt with an image.
    grid_indices = [groups_with_image.index(group) for group in groups if group in groups_with_image]
    grids = images["image_grid_thw"][grid_indices]
    position_ids: Tensor
    position_ids, _ = model.model.get_rope_index(
        input_ids, is_image.int(), image_grid_thw=grids, attention_mask=attention_mask
    )
    return position_ids
