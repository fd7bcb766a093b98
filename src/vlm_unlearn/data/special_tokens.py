"""Neutralizes the special tokens of chat models in texts that people wrote.

A tokenizer reads ``<|im_end|>`` or ``<image>`` in a question as a control token: the turn ends, or an image is
expected. A space after its first character makes it text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

# Strings that chat models may treat as the end of a turn, an image or another speaker, wherever they occur.
_SPECIAL_TOKEN = re.compile(
    r"<(?=\|[^|<>\n]{1,40}\|>|\uff5c[^\uff5c<>\n]{1,40}\uff5c>"
    r"|/?(?:s|bos|eos|pad|unk|image|video|img|IMG_CONTEXT|start_of_turn|end_of_turn|start_of_image|end_of_image"
    r"|end_of_utterance|fake_token_around_image|image_soft_token|think)>)"
    r"|\[(?=/?(?:INST|SYS|IMG|THINK|SYSTEM_PROMPT)\])"
)


def break_special_tokens(text: str) -> str:
    """Inserts a space into each string that may be a special token of a chat model.

    It is for texts whose tokenizer is not available here, such as those that a server tokenizes.
    """
    return _SPECIAL_TOKEN.sub(lambda match: match.group() + " ", text)


def break_tokens(text: str, tokens: Iterable[str]) -> str:
    """Inserts a space into each of certain tokens in a text."""
    for token in tokens:
        if token in text:
            text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


def special_tokens(processor: Any) -> tuple[str, ...]:
    """Returns the special tokens and the image placeholders of a processor, the longest first."""
    tokenizer = processor.tokenizer
    return _special_tokens(processor, len(tokenizer))


@lru_cache(maxsize=8)
def _special_tokens(processor: Any, vocabulary_size: int) -> tuple[str, ...]:
    tokenizer = processor.tokenizer
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    tokens = {token.content for token in added if token.special} | set(getattr(tokenizer, "all_special_tokens", ()))
    # In Gemma 3 and InternVL, some of these attributes exist only on the tokenizer.
    names = ("image_token", "video_token", "context_image_token")
    placeholders = [getattr(source, name, None) for source in (processor, tokenizer) for name in names]
    tokens |= {str(token) for token in placeholders if token}  # InstructBLIP has an AddedToken
    return tuple(sorted((token for token in tokens if len(token) > 1), key=len, reverse=True))
