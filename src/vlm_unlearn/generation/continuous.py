"""Continuous batching: rows whose answer has ended make room for the next prompts (Yu et al. 2022, OSDI, Orca)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch.nn.functional import pad

from vlm_unlearn.data.encoding import Turn
from vlm_unlearn.generation.decoding import SeededSampling
from vlm_unlearn.generation.sharing import CachedRows, PromptQueue, join_rows
from vlm_unlearn.modeling.vlm import VisionLanguageModel

# Each change of the batch copies its cache, and a prefill of few rows is slow. A change therefore waits until this
# share of the rows has ended.
ENDED_SHARE = 0.25


def generate_continuously(
    vlm: VisionLanguageModel,
    turns: Sequence[Turn],
    turn_indices: Sequence[int],
    max_new_tokens: int,
    batch_size: int,
    eos_token_ids: Collection[int],
    sampler: SeededSampling | None = None,
) -> tuple[list[list[int]], list[int]]:
    """Generates the answers to prompts with shared prefixes (`vlm_unlearn.generation.sharing`).

    Args:
        vlm: The model, in eval mode, and its processor.
        turns: The prompts.
        turn_indices: The index into `turns` of each of R rows.
        max_new_tokens: The maximum number of tokens of an answer.
        batch_size: The maximum number of rows that run at once.
        eos_token_ids: The tokens that end an answer.
        sampler: Samples the tokens, with one random stream per row. The default is greedy decoding.

    Returns:
        The tokens of each row's answer, and the last token of each row's prompt.

    Raises:
        PrefixSharingError: The prompts cannot share prefixes.
        UserError: A prompt cannot be encoded. The error contains its id.
    """
    queue = PromptQueue(vlm, turns, turn_indices, max_new_tokens)
    last_tokens = [queue.last_token(row) for row in range(len(turn_indices))]
    answers: list[list[int]] = [[] for _ in turn_indices]
    rows: list[int] = []  # of the batch
    batch: CachedRows | None = None
    unfinished: list[int] = []  # indices into `rows`
    while queue or unfinished:
        selections: list[tuple[CachedRows, Sequence[int]]] = []
        if batch is not None and unfinished:
            selections.append((batch, unfinished))
        rows = [rows[index] for index in unfinished]
        if queue:
            new_rows, prefilled = queue.prefill(batch_size - len(rows))
            selections.append((prefilled, range(len(new_rows))))
            rows += new_rows
        batch = join_rows(selections)
        most_unfinished = (1 - ENDED_SHARE) * (batch_size if queue else len(rows))
        processor = None if sampler is None else sampler.select_rows(rows)
        decoder = _Decoder(vlm.base_model, batch, max_new_tokens, processor)
        unfinished = list(range(len(rows)))
        tokens = [answers[row][-1] if answers[row] else last_tokens[row] for row in rows]
        while len(unfinished) > most_unfinished:
            tokens = decoder.step(tokens)
            for index in unfinished:
                answers[rows[index]].append(tokens[index])
            unfinished = [
                index
                for index in unfinished
                if tokens[index] not in eos_token_ids and len(answers[rows[index]]) < max_new_tokens
            ]
        batch = decoder.cached_rows()
    return answers, last_tokens


class _Decoder:
    """Runs one token of each row at a time.

    Args:
        model: The model of transformers.
        batch: B rows. Their cache grows in place.
        max_new_tokens: The maximum number of steps.
        sampler: The processor of the scores of these rows, or None for greedy decoding.
    """

    def __init__(self, model: Any, batch: CachedRows, max_new_tokens: int, sampler: SeededSampling | None) -> None:
        self._model = model
        self._batch = batch
        self._sampler = sampler
        self._steps = 0
        self._mask = pad(batch.attention_mask, (0, max_new_tokens), value=1)  # of all columns up to the last step
        self._has_padding = not bool(self._mask.all())
        attention: str = model.config.get_text_config(decoder=True)._attn_implementation
        # A mask of this shape is used as it is. Otherwise transformers would build it in every step.
        self._sdpa_mask = self._mask[:, None, None].bool() if attention == "sdpa" else None

    def step(self, tokens: list[int]) -> list[int]:
        """Appends a token to each row and returns the next tokens."""
        self._steps += 1
        width = self._batch.attention_mask.shape[1] + self._steps
        attention_mask = None
        if self._has_padding:
            attention_mask = self._mask[:, :width] if self._sdpa_mask is None else self._sdpa_mask[..., :width]
        input_ids = torch.tensor(tokens, device=self._mask.device)[:, None]
        outputs = self._model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=self._batch.positions + (self._steps - 1),
            past_key_values=self._batch.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        scores = outputs.logits[:, -1].float()
        if self._sampler is not None:
            scores = self._sampler(input_ids, scores)
        next_tokens: list[int] = scores.argmax(dim=-1).tolist()
        return next_tokens

    def cached_rows(self) -> CachedRows:
        """Returns the rows with all tokens that have run."""
        width = self._batch.attention_mask.shape[1] + self._steps
        return CachedRows(self._batch.cache, self._mask[:, :width], self._batch.positions + self._steps)
