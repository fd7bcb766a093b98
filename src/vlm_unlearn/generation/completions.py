"""Reads the chat completions of OpenAI-compatible servers: texts, errors, content filters and token counts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

CONTENT_FILTER = "content_filter"  # the finish reason of OpenAI and Azure
_CONTENT_FILTER = re.compile(
    r"content[ _-]?(management[ _-]|moderation[ _-]|safety[ _-])?(filter|policy|policies)|ResponsibleAIPolicyViolation"
    r"|moderation_blocked|data_inspection_failed|prompt[ _]blocked|safety (system|filter|settings)|flagged (as|by|for)"
    r"|violat\w+ (our|the|openai's) \w*\s?polic",
    re.IGNORECASE,
)


def is_content_filter(body: object) -> bool:
    """Returns whether the error of a server says that a content filter has rejected the question or the answer.

    Args:
        body: The content of the key ``error`` of the response, of OpenAI, Azure, or a server with their API.
    """
    choices = body.get("choices") if isinstance(body, dict) else None
    if isinstance(choices, list) and any(
        isinstance(choice, dict) and choice.get("finish_reason") == CONTENT_FILTER for choice in choices
    ):
        return True  # an error status with the body of an answer
    inner = body.get("innererror") if isinstance(body, dict) else body
    fields = [source.get(key) for source in (body, inner) if isinstance(source, dict) for key in ("code", "type")]
    message = body.get("message") if isinstance(body, dict) else body
    texts = [str(field) for field in (*fields, message) if isinstance(field, str)]
    return any(_CONTENT_FILTER.search(text[:4000]) for text in texts)


def error_in(completion: object) -> tuple[int, object] | None:
    """Returns the status and the error that a response with HTTP status 200 contains instead of an answer, or None."""
    if not isinstance(completion, dict) or completion.get("choices") or not completion.get("error"):
        return None
    error = completion["error"]
    status = error.get("code") if isinstance(error, dict) else None
    return (status if isinstance(status, int) else 500), error


def text_of(message: Mapping[str, Any]) -> str | None:
    """Returns the text of an answer: a text, the text parts of a list, or a structured refusal.

    Raises:
        MalformedResponseError: The content is neither.
    """
    content = message.get("content")
    if isinstance(content, list):
        parts = [part for part in content if isinstance(part, dict) and part.get("type") in ("text", "output_text")]
        texts = [part["text"] for part in parts if isinstance(part.get("text"), str)]
        if len(texts) < len(parts) or not all(isinstance(part, dict) for part in content):
            raise MalformedResponseError("the content of the answer is not a text")
        content = "".join(texts) if texts else None
    if content is None and isinstance(message.get("refusal"), str):
        content = message["refusal"]
    if content is not None and not isinstance(content, str):
        raise MalformedResponseError("the content of the answer is not a text")
    return content


def has_reasoning(message: Mapping[str, Any]) -> bool:
    """Returns whether an answer contains reasoning next to its text, as vLLM and other servers return it."""
    return any(isinstance(message.get(key), str) and message[key] for key in ("reasoning_content", "reasoning"))


class MalformedResponseError(Exception):
    """The server's response is not a chat completion."""


def token_usage(completion: object) -> tuple[int, int] | None:
    """Returns the prompt and completion tokens that a server reports, or None if it reports none or no valid ones."""
    usage = completion.get("usage") if isinstance(completion, dict) else None
    if not isinstance(usage, dict):
        return None
    prompt_tokens, completion_tokens = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if not type(prompt_tokens) is type(completion_tokens) is int:
        return None
    valid = min(prompt_tokens, completion_tokens) >= 0 and max(prompt_tokens, completion_tokens) < 2**40
    return (prompt_tokens, completion_tokens) if valid else None
