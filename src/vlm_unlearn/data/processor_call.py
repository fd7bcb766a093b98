"""Calls processors so that the chat template determines the complete text, in every family.

Most processors replace each image placeholder of the text by the tokens of the image and change nothing else. Those of
PaliGemma and BLIP also insert other tokens into the text: image tokens before the first token, a beginning-of-sequence
token after them, a line break at the end. These tokens would end up after the answer, so such a processor is not called
as a function. Its tokenizer and its image processor are called instead, and the chat template contains the tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from vlm_unlearn.errors import UserError, quoted

Processor = Any  # transformers.ProcessorMixin: the call signature differs between families
MAX_PIXELS = 1 << 25  # of a resized image. Qwen3-VL's limit is 1 << 24


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """Turns a panic of the tokenizers library into an error. A panic derives from BaseException, like Ctrl-C.

    Raises:
        UserError: The library panicked, for example because a regular expression of tokenizer.json takes too long.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise UserError(
            f"the tokenizer fails for this text: {quoted(error, 200)}. Shorten the text, or use the model's original "
            "tokenizer.json.",
            code="tokenizer-failed",
        ) from None


def apply_chat_template(
    processor: Processor, messages: list[dict[str, Any]], record: str, add_generation_prompt: bool = False
) -> str:
    """Returns the text of messages in the model's chat template.

    Args:
        processor: The processor of the model.
        messages: The messages, in the form of transformers.
        record: The id of the example, for error messages.
        add_generation_prompt: Whether the text ends where the model answers.

    Raises:
        UserError: The template fails.
    """
    try:
        text: str = processor.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, tokenize=False)
    except Exception as error:  # a template is a program, which can raise any error
        raise UserError(
            f"the model's chat template fails: {type(error).__name__}: {quoted(error, 300)}",
            code="chat-template-failed",
            record=quoted(record),
        ) from error
    return text


def image_sides(size: Any) -> dict[str, int]:
    """Returns the integers of a processor's image size, which is a number, a mapping or a `SizeDict`."""
    if isinstance(size, int):
        return {"": size}
    if not isinstance(size, Mapping):
        size = getattr(size, "__dict__", None) or {}
    return {key: value for key, value in size.items() if isinstance(value, int)}


def validate_resized_image(processor: Processor, width: int, height: int) -> None:
    """Checks that a processor does not resize an image to a gigantic one.

    Some processors resize the shorter side to a fixed length. With 336 pixels, an image of 20,000 x 1 would fill 7 GB.

    Args:
        processor: The processor of the model.
        width: The width of the image in pixels.
        height: Its height.

    Raises:
        UserError: The resized image would have too many pixels.
    """
    image_processor = getattr(processor, "image_processor", None)
    sides = image_sides(getattr(image_processor, "size", None))
    if set(sides) != {"shortest_edge"} or not getattr(image_processor, "do_resize", False):
        return
    pixels = sides["shortest_edge"] ** 2 * max(width, height) // min(width, height)
    if pixels > 2 * MAX_PIXELS:
        raise UserError(
            f"the image has {width} x {height} pixels, and the model's processor would resize it to {pixels:,} pixels. "
            "Crop it, or pad it to a square.",
            code="image-too-large",
        )


def has_causal_suffix(processor: Processor) -> bool:
    """Returns whether image and question attend to each other in both directions, and only the answer is causal.

    Source: PaliGemma (arXiv 2407.07726), figure 2. Its processor takes the answer as ``suffix``.
    """
    processor_type: Any = type(processor)
    return _takes_suffix(processor_type)


@lru_cache(maxsize=32)
def _takes_suffix(processor_type: Any) -> bool:
    return "suffix" in inspect.signature(processor_type.__call__).parameters


def requires_image(processor: Processor) -> bool:
    """Returns whether the model needs an image in every sample (PaliGemma, BLIP-2, InstructBLIP)."""
    return has_causal_suffix(processor) or hasattr(processor, "num_query_tokens")


def image_token_of(processor: Processor) -> str:
    """Returns the placeholder of an image in the text. Some processors have it as an `AddedToken`."""
    return str(processor.image_token)


def needs_special_tokens(processor: Processor, text: str) -> bool:
    """Returns whether the tokenizer must add special tokens. Some chat templates already contain the first one."""
    start = processor.tokenizer.bos_token
    if requires_image(processor):  # the images come before the beginning-of-sequence token
        text = text.replace(image_token_of(processor), "")
    return start is None or not text.startswith(start)


def call_processor(
    processor: Processor, texts: Sequence[str], prompts: Sequence[str], images: Sequence[list[Any]], padding_side: str
) -> dict[str, Tensor]:
    """Returns the tensors of a batch of texts in the chat template.

    Args:
        processor: The processor of the model.
        texts: The text of each sample.
        prompts: The part of each text before the first answer with labels, or the text if there is none.
        images: The images of each sample, at most one.
        padding_side: ``left`` or ``right``.
    """
    special_tokens = needs_special_tokens(processor, texts[0])
    if not requires_image(processor):
        encoded = processor(
            text=list(texts),
            **({"images": list(images)} if any(images) else {}),
            padding=True,
            padding_side=padding_side,
            add_special_tokens=special_tokens,
            return_tensors="pt",
        )
        tensors = {key: value for key, value in encoded.items() if isinstance(value, Tensor)}
        # LLaVA-OneVision counts images by sample there. Every sample has at most one, which is the default.
        tensors.pop("batch_num_images", None)
        return tensors
    placeholder = image_token_of(processor)
    count = getattr(processor, "num_query_tokens", None) or processor.image_seq_length
    tensors = dict(
        processor.tokenizer(
            [text.replace(placeholder, placeholder * count) for text in texts],
            padding=True,
            padding_side=padding_side,
            add_special_tokens=special_tokens,
            return_token_type_ids=False,
            return_tensors="pt",
        )
    )
    tensors["pixel_values"] = processor.image_processor([row[0] for row in images], return_tensors="pt")["pixel_values"]
    if has_causal_suffix(processor):
        tensors["token_type_ids"] = _token_type_ids(processor, texts, prompts, tensors["attention_mask"])
    if hasattr(processor, "qformer_tokenizer"):
        tensors.update(_qformer_inputs(processor, prompts))
    return tensors


def _token_type_ids(
    processor: Processor, texts: Sequence[str], prompts: Sequence[str], attention_mask: Tensor
) -> Tensor:
    """Returns [B, S]: 1 from the first answer with labels on, where attention is causal, and 0 before it."""
    token_type_ids = torch.zeros_like(attention_mask)
    for row, (text, prompt) in enumerate(zip(texts, prompts, strict=True)):
        ids, prompt_ids = (processor.tokenizer(part, add_special_tokens=False)["input_ids"] for part in (text, prompt))
        pairs = zip(ids, prompt_ids, strict=False)
        common = next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(ids), len(prompt_ids)))
        end = int(attention_mask[row].nonzero().max()) + 1
        token_type_ids[row, end - (len(ids) - common) : end] = 1
    return token_type_ids


def _qformer_inputs(processor: Processor, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Returns the question as the Q-Former reads it: without the answer, which it must not see, and without images."""
    start = processor.tokenizer.bos_token or ""
    questions = [prompt.replace(image_token_of(processor), "").removeprefix(start) for prompt in prompts]
    tokenizer = processor.qformer_tokenizer
    encoded = tokenizer(
        questions, padding=True, truncation=True, max_length=min(tokenizer.model_max_length, 512), return_tensors="pt"
    )
    return {f"qformer_{name}": encoded[name] for name in ("input_ids", "attention_mask")}
