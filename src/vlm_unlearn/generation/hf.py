"""Greedy answers from a transformers model, in batches, resumable after a kill at any moment."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vlm_unlearn.config import GenerationConfig
from vlm_unlearn.data.batching import Processor, Turn, encode, move
from vlm_unlearn.data.images import resolve_image
from vlm_unlearn.records import Prompt, Response
from vlm_unlearn.store import RecordLog


def generate(
    model: Any,
    processor: Processor,
    prompts: Sequence[Prompt],
    images: Mapping[str, Path],
    file: Path,
    config: GenerationConfig,
    on_done: Callable[[int, int], None] | None = None,
) -> None:
    """Appends one Response a prompt to `file`; prompts that are answered there already are passed over.

    The batches are a function of the prompts alone. A batch that a kill cut short is generated whole again, so that answers
    don't depend on where the kill fell.

    Args:
        model: an image-text-to-text model, on its device, in eval mode.
        images: image root of each prompt set, by `Prompt.set`.
        on_done: called with (answered, all) after each batch.
    """
    log = RecordLog(file, Response)
    done = 0
    for batch in _batches(prompts, config.batch_size):
        if any((prompt.id, 0) not in log.keys for prompt in batch):
            log.append(_answer(model, processor, batch, images, config))
        done += len(batch)
        if on_done:
            on_done(done, len(prompts))


def answers(
    model: Any, processor: Processor, prompts: Sequence[Prompt], images: Mapping[str, Path], config: GenerationConfig
) -> Iterator[list[Response]]:
    """The answers to all prompts, a batch at a time, kept in no file. Arguments as in `generate`."""
    return (_answer(model, processor, batch, images, config) for batch in _batches(prompts, config.batch_size))


def _batches(prompts: Sequence[Prompt], size: int) -> Iterator[list[Prompt]]:
    """Prompts of alike lengths together, for less padding; with and without image apart, as mllama needs it. Ties keep file order."""
    for has_image in (True, False):
        alike = [prompt for prompt in prompts if (prompt.image is not None) == has_image]
        alike.sort(key=lambda prompt: len(prompt.question.split()))
        yield from (alike[start : start + size] for start in range(0, len(alike), size))


@torch.no_grad()
def _answer(
    model: Any, processor: Processor, prompts: Sequence[Prompt], images: Mapping[str, Path], config: GenerationConfig
) -> list[Response]:
    turns = [
        Turn(
            prompt.id,
            None if prompt.image is None else resolve_image(images[prompt.set], prompt.image, f'prompt "{prompt.id}"'),
            prompt.question,
            None,
        )
        for prompt in prompts
    ]
    inputs = move(encode(processor, turns, padding_side="left"), model.device, model.dtype)
    output = model.generate(**inputs, max_new_tokens=config.max_new_tokens, do_sample=False)
    new = output[:, inputs["input_ids"].shape[1] :]
    ends = model.generation_config.eos_token_id
    closing = set(ends if isinstance(ends, list) else [ends])
    texts = processor.batch_decode(new, skip_special_tokens=True)
    return [
        Response(
            prompt_id=prompt.id,
            text=text.strip(),
            finish_reason="stop" if closing & set(tokens.tolist()) else "length",
        )
        for prompt, text, tokens in zip(prompts, texts, new, strict=True)
    ]
