"""Turns examples into model inputs: chat template, images, labels on answer tokens only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlm_unlearn.data.images import image_size, open_image
from vlm_unlearn.errors import RequestError
from vlm_unlearn.losses import IGNORED

Batch = dict[str, Tensor]
Processor = Any  # transformers.ProcessorMixin: each family has its own call signature


@dataclass(frozen=True)
class Turn:
    """One question, ready to encode; `answer` None leaves the turn open for the model."""

    id: str
    image: Path | None
    question: str
    answer: str | None


def render(processor: Processor, turn: Turn) -> tuple[str, str | None]:
    """The chat template's text up to the answer, and with it (None without an answer).

    Example:
        with LLaVA-1.5's template, ``("USER: <image>\\nWhat is it? ASSISTANT:", "USER: <image>\\nWhat is it? ASSISTANT: A cat.")``

    Raises:
        RequestError: the question or the answer holds the processor's image placeholder; the record is named.
    """
    token = getattr(processor, "image_token", None)
    if token and (token in turn.question or token in (turn.answer or "")):
        raise RequestError(f'"{turn.id}": the text holds the image placeholder {token}; take it out')
    content: list[dict[str, str]] = [{"type": "image"}] if turn.image is not None else []
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": turn.question}]}]
    open_text: str = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    if turn.answer is None:
        return open_text, None
    messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
    # Some templates (LLaVA-1.5's) end a turn with a space; trained on, it would teach the model to go on after its answer.
    return open_text, processor.apply_chat_template(messages, tokenize=False).rstrip()


def encode(processor: Processor, turns: Sequence[Turn], padding_side: str) -> Batch:
    """Encodes turns without labels, for generation (``left``) or hidden states (``right``).

    Returns every key that the processor made; ``input_ids`` and ``attention_mask`` are [B, S].
    """
    texts = [rendered[1] or rendered[0] for rendered in (render(processor, turn) for turn in turns)]
    return _call(processor, texts, turns, padding_side)


def encode_with_labels(processor: Processor, turns: Sequence[Turn], max_length: int) -> Batch:
    """Encodes question and answer, padded on the right, with ``labels`` [B, S] that are -100 off the answer.

    Answer tokens are found by tokenising the rendering with and without the answer. A closing token is added where the chat
    template writes none. An answer that doesn't fit is cut at its end.

    Raises:
        RequestError: a question with its image tokens leaves no room for the answer; the record is named.
    """
    tokenizer = processor.tokenizer
    closing = _closing_ids(processor)
    texts: list[str] = []
    answer_ids: list[list[int]] = []
    for turn in turns:
        open_text, full_text = render(processor, turn)
        assert full_text is not None
        opened = tokenizer(open_text, add_special_tokens=False)["input_ids"]
        full = tokenizer(full_text, add_special_tokens=False)["input_ids"]
        if full[-1] not in closing:
            full_text += tokenizer.eos_token
            full = tokenizer(full_text, add_special_tokens=False)["input_ids"]
        common = next((i for i, (a, b) in enumerate(zip(opened, full, strict=False)) if a != b), min(len(opened), len(full)))
        if common >= len(full):
            raise RequestError(f'example "{turn.id}": the answer has no tokens')
        texts.append(full_text)
        answer_ids.append(full[common:])
    batch = _call(processor, texts, turns, "right")
    batch["labels"] = torch.full_like(batch["input_ids"], IGNORED)
    longest = 0
    for row, (turn, answer) in enumerate(zip(turns, answer_ids, strict=True)):
        end = int(batch["attention_mask"][row].sum())
        start = end - len(answer)
        if batch["input_ids"][row, start:end].tolist() != answer:
            raise RequestError(
                f'example "{turn.id}": the answer is not at the end of the chat template\'s text; this template is not supported'
            )
        if start >= max_length:
            raise RequestError(
                f'example "{turn.id}": question and image take {start} tokens, max_length is {max_length}; '
                f"raise training.max_length (an image is never cut)"
            )
        batch["labels"][row, start:end] = torch.tensor(answer)
        longest = max(longest, min(end, max_length))
    return _cut(batch, longest)


class PromptMeter:
    """Counts the tokens of questions with their image tokens, without processing an image that is like one seen before."""

    def __init__(self, processor: Processor) -> None:
        self._processor = processor
        self._image_tokens: dict[tuple[int, int], int] = {}

    def tokens(self, turn: Turn) -> int:
        """Tokens of the turn's rendering up to the answer; an image costs what its pixel size costs."""
        text, _ = render(self._processor, turn)
        count = len(self._processor.tokenizer(text, add_special_tokens=_needs_special_tokens(self._processor, text))["input_ids"])
        if turn.image is None:
            return count
        size = image_size(turn.image)
        if size not in self._image_tokens:
            encoded = encode(self._processor, [replace(turn, answer=None)], padding_side="right")
            self._image_tokens[size] = encoded["input_ids"].shape[1] - count
        return count + self._image_tokens[size]


def _needs_special_tokens(processor: Processor, text: str) -> bool:
    """Whether the tokenizer must add its own: not where the chat template has written the first one already."""
    start = processor.tokenizer.bos_token
    return start is None or not text.startswith(start)


def _closing_ids(processor: Processor) -> set[int]:
    tokenizer = processor.tokenizer
    names = ["<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<end_of_utterance>"]
    return {tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(names)} - {tokenizer.unk_token_id, None}


def _call(processor: Processor, texts: list[str], turns: Sequence[Turn], padding_side: str) -> Batch:
    images = [[open_image(turn.image)] for turn in turns if turn.image is not None]
    arguments: dict[str, Any] = {"images": images} if images else {}
    encoded = processor(
        text=texts,
        **arguments,
        padding=True,
        padding_side=padding_side,
        add_special_tokens=_needs_special_tokens(processor, texts[0]),
        return_tensors="pt",
    )
    return {key: value for key, value in encoded.items() if isinstance(value, Tensor)}


def _cut(batch: Batch, length: int) -> Batch:
    """Cuts every token-aligned tensor [B, S, ...] to `length` positions; what is aligned with images stays whole."""
    rows, width = batch["input_ids"].shape
    return {
        key: value[:, :length]
        if value.dim() >= 2 and value.shape[0] == rows and value.shape[1] == width and key != "pixel_values"
        else value
        for key, value in batch.items()
    }


def move(batch: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype) -> Batch:
    """The batch on a device, the processor's floating-point tensors in the model's dtype; reference values keep theirs."""
    return {
        key: value.to(device, dtype) if value.is_floating_point() and not key.startswith("reference_") else value.to(device)
        for key, value in batch.items()
    }
