"""Prefix sharing for generation: prompts about the same image run their common prefix only once.

Prompts often contain several questions about one image, or several samples of one prompt. Without sharing, each row
runs all image tokens again. `PromptQueue.prefill` fills the key-value cache of the next rows in two passes instead:

1. **Prefix pass.** Prompts with the same image and the same tokens before it form a group. Their longest common prefix
   runs once per group. The cache rows are then copied to all prompts of the group. The prefix of a group is stored as
   long as further prompts of the group follow.
2. **Suffix pass.** The remaining tokens run once per prompt, except the last token. The cache rows are then copied to
   all samples of the prompt.

Decoding then runs the last token of each row, which predicts the first token of the answer.

For example, three prompts about two images I and J occupy these columns (``.`` is padding)::

    prefix    suffix
    sIIIIab   cde       prompt 0, image I after the start token s
    sIIIIab   ..f       prompt 1, image I
    .sJJJkl   ..m       prompt 2, image J: alone in its group, so its prefix is all but the last token

The prefix pass runs prompts 0 and 2. The suffix pass runs ``cd`` and padding. Decoding runs the last column.

Prefixes and suffixes are both padded on the left. The attention mask hides the padding, and position ids do not count
it. Each prompt therefore gets the same result as in a batch of its own, up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

from vlm_unlearn.data.encoding import Turn, encode, move, render, token_ids
from vlm_unlearn.data.processor_call import Processor, needs_special_tokens
from vlm_unlearn.generation.cache import CacheRows, join_caches, preallocated_cache, sliding_windows
from vlm_unlearn.modeling.vlm import VisionLanguageModel

# The processor's outputs for text. Its other outputs belong to the images.
TEXT_INPUTS = ("input_ids", "attention_mask", "mm_token_type_ids")


class PrefixSharingError(Exception):
    """The prompts cannot share prefixes. They must be generated without."""


@dataclass(frozen=True)
class CachedRows:
    """B sequences in a cache of S columns."""

    cache: DynamicCache
    attention_mask: Tensor  # [B, S], 0 on padding
    positions: Tensor  # position ids of the next token: [B, 1], or [3, B, 1] with multi-axis rotary embeddings

    def __len__(self) -> int:
        return len(self.attention_mask)


def join_rows(selections: Iterable[tuple[CachedRows, Sequence[int]]]) -> CachedRows:
    """Returns selected rows of one or several batches as one batch, without columns that contain nothing but padding.

    Args:
        selections: The batches, and the indices of their rows. Indices can be repeated.
    """
    caches, masks, positions = [], [], []
    for rows, indices in selections:
        if not indices:
            continue
        mask = rows.attention_mask[indices]
        start = int(mask.any(dim=0).int().argmax())
        caches.append(CacheRows(rows.cache, indices, start))
        masks.append(mask[:, start:])
        positions.append(rows.positions[..., indices, :])
    width = max(mask.shape[1] for mask in masks)
    return CachedRows(
        join_caches(caches),
        torch.cat([pad(mask, (width - mask.shape[1], 0)) for mask in masks]),
        torch.cat(positions, dim=-2),
    )


class PromptQueue:
    """Prompts that are prefilled some at a time, in an order in which those of a group follow each other.

    Args:
        vlm: The model, with or without PEFT adapters, and its processor.
        turns: P turns without an answer, the prompts. The suffixes of equal prompts would run twice.
        turn_indices: The index into `turns` of each of the rows to generate. A prompt has one row per sample.
        max_new_tokens: The number of tokens that will be generated at most.

    Raises:
        PrefixSharingError: The family does not support prefix sharing.
        UserError: A prompt cannot be encoded. The error contains its id.
    """

    def __init__(
        self, vlm: VisionLanguageModel, turns: Sequence[Turn], turn_indices: Sequence[int], max_new_tokens: int
    ) -> None:
        if not vlm.supports_prefix_sharing:
            raise PrefixSharingError
        self._model = vlm.base_model  # without PEFT's wrapper, but with its adapters
        self._processor: Processor = vlm.processor
        self._text_config = self._model.config.get_text_config(decoder=True)
        self._sliding_windows = sliding_windows(self._text_config)
        self._turns = turns
        self._turn_indices = turn_indices
        self._max_new_tokens = max_new_tokens
        self._ids = _tokenize(self._processor, turns)  # of each prompt, where an image is one token
        self._image_ends = [_end_of_image(ids, self._model.config.image_token_id) for ids in self._ids]
        images = [turn.image for turn in turns]  # they compare by path or content
        self._groups, self._prefix_lengths = group_prompts(self._ids, images, self._image_ends)
        if not all(self._prefix_lengths):  # there is nothing to share, and no pass can run zero tokens
            raise PrefixSharingError
        self._stored_prefix: CachedRows | None = None
        self._pending = sorted(range(len(turn_indices)), key=lambda row: self._groups[turn_indices[row]])

    def __len__(self) -> int:
        """Returns the number of rows that have not been prefilled."""
        return len(self._pending)

    def last_token(self, row: int) -> int:
        """Returns the last token of a row's prompt."""
        return self._ids[self._turn_indices[row]][-1]

    def prefill(self, count: int) -> tuple[list[int], CachedRows]:
        """Runs the prompts of the next `count` rows, except for the last token of each.

        Returns:
            The indices of the rows, and the rows.

        Raises:
            PrefixSharingError: The processor changes the text after the image, or a sliding attention window is shorter
                than the padded prompt plus `max_new_tokens` (the window counts the padding between prefix and suffix).
            UserError: An image cannot be processed.
        """
        rows, self._pending = self._pending[:count], self._pending[count:]
        prompts = list(dict.fromkeys(self._turn_indices[row] for row in rows))
        groups = list(dict.fromkeys(self._groups[prompt] for prompt in prompts))
        suffixes = [self._ids[prompt][self._prefix_lengths[self._groups[prompt]] :] for prompt in prompts]
        prefixes = self._prefixes(groups)
        prefilled = join_rows([(prefixes, [groups.index(self._groups[prompt]) for prompt in prompts])])
        if max(map(len, suffixes)) > 1:
            ids, mask = pad_left([suffix[:-1] for suffix in suffixes], self._model.device)
            prefilled = self._run(prefilled, ids, mask)
        indices = [prompts.index(self._turn_indices[row]) for row in rows]
        if indices != list(range(len(prefilled))):
            prefilled = join_rows([(prefilled, indices)])
        return rows, prefilled

    def _prefixes(self, groups: Sequence[int]) -> CachedRows:
        """Returns the prefix of each group. Stores the last one if further rows of its group follow."""
        if self._stored_prefix is None:
            prefixes = self._run_prefixes(groups)
        elif len(groups) == 1:  # the group of the stored prefix, since rows are in the order of groups
            prefixes = self._stored_prefix
        else:
            new_prefixes = self._run_prefixes(groups[1:])
            prefixes = join_rows([(self._stored_prefix, [0]), (new_prefixes, range(len(groups) - 1))])
        has_more = bool(self._pending) and self._groups[self._turn_indices[self._pending[0]]] == groups[-1]
        self._stored_prefix = join_rows([(prefixes, [len(groups) - 1])]) if has_more else None
        return prefixes

    def _run_prefixes(self, groups: Sequence[int]) -> CachedRows:
        """Runs the prefix of each group with its image."""
        first_prompts = [self._groups.index(group) for group in groups]
        # The side of the padding does not matter, since the mask removes it.
        encoded = encode(self._processor, [self._turns[prompt] for prompt in first_prompts], padding_side="right")
        prefixes = []
        for prompt, padded_ids, mask in zip(
            first_prompts, encoded["input_ids"], encoded["attention_mask"].bool(), strict=True
        ):
            expanded_ids = padded_ids[mask].tolist()
            after_image = self._ids[prompt][self._image_ends[prompt] :]
            # Counted from the end: some processors add tokens after the image, which belong to it.
            if expanded_ids[len(expanded_ids) - len(after_image) :] != after_image:
                raise PrefixSharingError  # the tokens of the image cannot be separated from the text
            suffix_length = len(self._ids[prompt]) - self._prefix_lengths[self._groups[prompt]]
            prefixes.append(expanded_ids[: len(expanded_ids) - suffix_length])
        input_ids, attention_mask = pad_left(prefixes, self._model.device)
        images = {name: value for name, value in encoded.items() if name not in TEXT_INPUTS}
        empty = CachedRows(
            preallocated_cache(self._text_config), attention_mask[:, :0], input_ids.new_zeros(len(groups), 1)
        )
        return self._run(empty, input_ids, attention_mask, move(images, self._model.device, self._model.dtype))

    def _run(
        self, rows: CachedRows, input_ids: Tensor, attention_mask: Tensor, images: Mapping[str, Tensor] | None = None
    ) -> CachedRows:
        """Appends tokens [B, N], padded on the left, to rows."""
        images = images or {}
        position_ids = rows.positions + (attention_mask.cumsum(dim=1) - 1).clamp(min=0)  # padding would get -1
        next_positions = rows.positions + attention_mask.sum(dim=1, keepdim=True)
        if "image_grid_thw" in images:
            is_image = input_ids == self._model.config.image_token_id
            position_ids, _ = self._model.model.get_rope_index(
                input_ids, is_image.int(), image_grid_thw=images["image_grid_thw"], attention_mask=attention_mask
            )
            # Text after an image continues from the largest position of the three axes.
            next_positions = (position_ids[..., -1:].amax(dim=0, keepdim=True) + 1).expand(len(position_ids), -1, -1)
        attention_mask = torch.cat([rows.attention_mask, attention_mask], dim=1)
        width = attention_mask.shape[1] + 1 + self._max_new_tokens
        if any(width > window for window in self._sliding_windows):
            raise PrefixSharingError
        self._model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=rows.cache,
            use_cache=True,
            logits_to_keep=1,  # the logits are not used, and 0 would compute all of them
            **images,
        )
        return CachedRows(rows.cache, attention_mask, next_positions)


def _tokenize(processor: Processor, turns: Sequence[Turn]) -> list[list[int]]:
    """Returns the tokens of each prompt. An image is one token."""
    texts = [render(processor, turn).text for turn in turns]
    special_tokens = {needs_special_tokens(processor, text) for text in texts}
    if len(special_tokens) > 1:
        return [token_ids(processor, text) for text in texts]
    ids: list[list[int]] = processor.tokenizer(texts, add_special_tokens=special_tokens.pop())["input_ids"]
    return ids


def _end_of_image(ids: Sequence[int], image_token_id: int) -> int:
    """Returns the index after the last token of the image, or 0 if the prompt has no image."""
    return next((end for end in range(len(ids), 0, -1) if ids[end - 1] == image_token_id), 0)


def group_prompts(
    prompts: Sequence[Sequence[int]], images: Sequence[object], image_ends: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Groups prompts that share an image, or none, and the tokens before it.

    Args:
        prompts: The token ids of each prompt, where an image is one token.
        images: The image of each prompt. Images are compared by `==`.
        image_ends: The index after the image in each prompt, 0 without an image.

    Returns:
        The group of each prompt, numbered from 0, and the length of each group's longest common prefix. The last token
        of a prompt is never in the prefix.
    """
    numbers: dict[tuple[object, ...], int] = {}
    groups = [
        numbers.setdefault((image, *ids[:end]), len(numbers))
        for ids, image, end in zip(prompts, images, image_ends, strict=True)
    ]
    members: list[list[Sequence[int]]] = [[] for _ in numbers]
    for group, ids in zip(groups, prompts, strict=True):
        members[group].append(ids)
    return groups, [_common_prefix_length(ids) for ids in members]


def _common_prefix_length(prompts: Sequence[Sequence[int]]) -> int:
    """Returns the length of the longest common prefix, but at least one token less than the shortest prompt."""
    limit = min(map(len, prompts)) - 1
    first, last = (
        min(map(list, prompts)),
        max(map(list, prompts)),
    )  # in lexicographic order, so that the others are between the two
    return next((index for index in range(limit) if first[index] != last[index]), limit)


def pad_left(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns token ids [B, N], padded with 0 on the left, and their attention mask."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask
