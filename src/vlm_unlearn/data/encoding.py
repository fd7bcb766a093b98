"""Turns examples into model inputs: chat template, images, labels on answer tokens only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlm_unlearn.data.images import image_size, open_image
from vlm_unlearn.errors import UserError
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
    history: tuple[tuple[str, str], ...] = ()  # the rounds before, question and answer; the image belongs to the first


@dataclass(frozen=True)
class Rendering:
    """A turn in the chat template's words, each text the beginning of the next.

    Each answer is closed: by the template, or by the end-of-sequence token where the template (LLaVA-1.5's) closes nothing.

    Example:
        with LLaVA-1.5's template, one round: ``opens = ("USER: <image>\\nWhat is it? ASSISTANT:",)`` and
        ``closes = ("USER: <image>\\nWhat is it? ASSISTANT: A cat.</s>",)``.
    """

    opens: tuple[str, ...]  # up to each round's answer
    closes: tuple[str, ...]  # with each round's answer; one less than `opens` where the last is left to the model

    @property
    def text(self) -> str:
        """The whole of it."""
        return self.closes[-1] if len(self.closes) == len(self.opens) else self.opens[-1]


def render(processor: Processor, turn: Turn) -> Rendering:
    """Puts a turn, with the rounds before it, through the chat template.

    Raises:
        UserError: a text holds the processor's image placeholder, or an answer says nothing; the record is named.
    """
    rounds = [*turn.history, (turn.question, turn.answer)]
    for token in _placeholders(processor):
        if any(token in (text or "") for pair in rounds for text in pair):
            raise UserError(f'"{turn.id}": the text holds the image placeholder {token}; take it out')
    messages: list[dict[str, Any]] = []
    opens: list[str] = []
    closes: list[str] = []
    for number, (question, answer) in enumerate(rounds):
        image = [{"type": "image"}] if turn.image is not None and number == 0 else []
        messages.append({"role": "user", "content": [*image, {"type": "text", "text": question}]})
        opens.append(processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        if answer is not None:
            said = answer.strip()
            if not said:
                raise UserError(f'"{turn.id}": an answer says nothing; there is nothing to train on')
            messages.append({"role": "assistant", "content": [{"type": "text", "text": said}]})
            # Some templates (LLaVA-1.5's) end a turn with a space; trained on, it would teach the model to go on after its answer.
            closed = processor.apply_chat_template(messages, tokenize=False).rstrip()
            closing = (
                processor.tokenizer.eos_token if closed.endswith(said) else ""
            )  # where the template closes nothing
            closes.append(closed + closing)
            messages[-1] = {"role": "assistant", "content": [{"type": "text", "text": said + closing}]}
    return Rendering(tuple(opens), tuple(closes))


def _placeholders(processor: Processor) -> list[str]:
    """What a family reads as the place of an image or video, in the template's words and in the model's."""
    named = (
        "image_token",
        "video_token",
        "context_image_token",
    )  # Gemma 3 and InternVL tell some by their tokenizer alone
    found = [getattr(part, name, None) for part in (processor, processor.tokenizer) for name in named]
    return list(dict.fromkeys(token for token in found if isinstance(token, str) and token))


def encode(processor: Processor, turns: Sequence[Turn], padding_side: str) -> Batch:
    """Encodes turns without labels, for generation (``left``) or hidden states (``right``).

    Returns every key that the processor made; ``input_ids`` and ``attention_mask`` are [B, S].

    Raises:
        UserError: turns with and without an image, and the family can't take both in one batch (mllama).
    """
    return _call(processor, [render(processor, turn).text for turn in turns], turns, padding_side)


def encode_with_labels(processor: Processor, turns: Sequence[Turn], max_length: int) -> Batch:
    """Encodes questions and answers, padded on the right, with ``labels`` [B, S] that are -100 off the answers.

    Answer tokens, those of earlier rounds too, are found by tokenising the rendering with and without the answer. What doesn't fit
    is cut at the end.

    Raises:
        UserError: a question with its image tokens leaves no room for an answer; the record is named. Also as `encode`.
    """
    encoded = [_answer_spans(processor, turn) for turn in turns]
    batch = _call(processor, [text for text, _, _ in encoded], turns, "right")
    batch["labels"] = torch.full_like(batch["input_ids"], IGNORED)
    longest = 0
    for row, (turn, (_, ids, spans)) in enumerate(zip(turns, encoded, strict=True)):
        end = int(batch["attention_mask"][row].sum())
        shift = end - len(ids)  # the processor puts the image's tokens, all before the first answer
        first = spans[0][0]
        if batch["input_ids"][row, first + shift : end].tolist() != ids[first:]:
            raise UserError(
                f'example "{turn.id}": the answer is not at the end of the chat template\'s text; this template is not supported'
            )
        if first + shift >= max_length:
            raise UserError(
                f'example "{turn.id}": question and image take {first + shift} tokens, max_length is {max_length}; '
                f"raise training.max_length (an image is never cut)"
            )
        for start, stop in spans:
            batch["labels"][row, start + shift : stop + shift] = torch.tensor(ids[start:stop])
        longest = max(longest, min(end, max_length))
    return _cut(batch, longest)


def _answer_spans(processor: Processor, turn: Turn) -> tuple[str, list[int], list[tuple[int, int]]]:
    """The turn's text, its tokens, and where in them the answers are, closing tokens included."""
    rendering = render(processor, turn)

    def tokens(text: str) -> list[int]:
        ids: list[int] = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    ids = tokens(rendering.text)
    spans = [
        (_common(tokens(opened), ids), _common(tokens(closed), ids))
        for opened, closed in zip(rendering.opens, rendering.closes, strict=True)
    ]
    if any(start >= stop for start, stop in spans):
        raise UserError(f'example "{turn.id}": an answer has no tokens')
    return rendering.text, ids, spans


def _common(part: Sequence[int], whole: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(part, whole, strict=False)) if a != b), min(len(part), len(whole)))


class PromptMeter:
    """Counts the tokens of questions with their image tokens, without processing an image that is like one seen before."""

    def __init__(self, processor: Processor) -> None:
        self._processor = processor
        self._image_tokens: dict[tuple[int, int], int] = {}

    def tokens(self, turn: Turn) -> int:
        """Tokens of the turn's rendering up to its (first) answer; an image costs what its pixel size costs."""
        return self._count(turn, render(self._processor, turn).opens[0])

    def tokens_in_all(self, turn: Turn) -> int:
        """Tokens of the turn's rendering, answers included."""
        return self._count(turn, render(self._processor, turn).text)

    def _count(self, turn: Turn, text: str) -> int:
        count = len(token_ids(self._processor, text))
        if turn.image is None:
            return count
        size = image_size(turn.image)
        if size not in self._image_tokens:
            alone = replace(turn, answer=None, history=())
            without = len(token_ids(self._processor, render(self._processor, alone).text))
            encoded = encode(self._processor, [alone], padding_side="right")
            self._image_tokens[size] = encoded["input_ids"].shape[1] - without
        return count + self._image_tokens[size]


def token_ids(processor: Processor, text: str) -> list[int]:
    """The tokens of a rendered turn, an image's placeholder left as it is."""
    ids: list[int] = processor.tokenizer(text, add_special_tokens=_needs_special_tokens(processor, text))["input_ids"]
    return ids


def _needs_special_tokens(processor: Processor, text: str) -> bool:
    """Whether the tokenizer must add its own: not where the chat template has written the first one already."""
    start = processor.tokenizer.bos_token
    return start is None or not text.startswith(start)


def _call(processor: Processor, texts: list[str], turns: Sequence[Turn], padding_side: str) -> Batch:
    # A turn without an image has its own empty list beside the others: idefics3, smolvlm and gemma3 match lists with texts.
    opened = {image: open_image(image) for image in dict.fromkeys(turn.image for turn in turns) if image is not None}
    images = [[opened[turn.image]] if turn.image is not None else [] for turn in turns]
    arguments: dict[str, Any] = {"images": images} if any(images) else {}
    encoded = processor(
        text=texts,
        **arguments,
        padding=True,
        padding_side=padding_side,
        add_special_tokens=_needs_special_tokens(processor, texts[0]),
        return_tensors="pt",
    )
    if "cross_attention_mask" in encoded and not all(images):
        # Its cross-attention layers, left out where there is no image, attend to the empty tiles here: other answers, silently.
        without = next(turn.id for turn in turns if turn.image is None)
        raise UserError(
            f'"{without}": has no image, others of its batch have, and {type(processor).__name__} can\'t take both in one batch; '
            "give every example of the set an image or none, or use batches of one"
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
        key: value.to(device, dtype)
        if value.is_floating_point() and not key.startswith("reference_")
        else value.to(device)
        for key, value in batch.items()
    }
