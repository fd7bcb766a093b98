"""Requests to chat models, their responses, and the cache of the responses."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from vlm_unlearn.data.images import ImageReference, ImageSource, open_image, png_url
from vlm_unlearn.data.pixels import DECODER_VERSION
from vlm_unlearn.data.special_tokens import break_special_tokens
from vlm_unlearn.errors import RunError, quoted
from vlm_unlearn.records import Prompt
from vlm_unlearn.store import digest_file, digest_json


@dataclass(frozen=True)
class ChatRequest:
    """One request to a chat model."""

    id: str
    text: str
    image: ImageSource | None = None
    seed: int | None = None  # for sampling; None with greedy decoding
    history: tuple[tuple[str, str], ...] = ()  # the earlier rounds of question and answer
    system: str | None = None  # the system message
    image_offset: int = 0  # the number of characters before the image, in the question of its round
    image_round: int = 0  # the round with the image, counted from 0
    prefill: str | None = None  # the beginning of the answer, which the model continues
    temperature: float | None = None  # in place of that of the chat model
    assessed_answer: str | None = None  # a complete answer to `text`, which a guard model assesses

    @classmethod
    def of_prompt(cls, id: str, prompt: Prompt, image: ImageSource | None, seed: int | None = None) -> ChatRequest:
        """Returns the request for the answer to a prompt."""
        return cls(
            id,
            prompt.question,
            image,
            seed,
            history=tuple((turn.question, turn.answer) for turn in prompt.history),
            system=prompt.system,
            image_offset=prompt.image_offset,
            image_round=prompt.image_round,
            prefill=prompt.prefill,
            temperature=prompt.temperature,
        )

    def messages(self) -> list[dict[str, Any]]:
        """Returns the messages of the OpenAI API. The image is encoded as PNG, and special tokens in texts become text.

        The last message is that of the assistant if there is a prefill or an answer to assess.

        Raises:
            UserError: The image cannot be read.
        """
        questions = [question for question, _ in self.history] + [self.text]
        answers = [answer for _, answer in self.history]
        messages = [] if self.system is None else [_message("system", self.system)]
        for number, question in enumerate(questions):
            messages.append(_message("user", question))
            if self.image is not None and number == self.image_round:
                part = {"type": "image_url", "image_url": {"url": png_url(open_image(self.image))}}
                prefix, suffix = question[: self.image_offset], question[self.image_offset :]
                messages[-1]["content"] = [*_text_parts(prefix), part, *_text_parts(suffix)]
            if number < len(answers):
                messages.append(_message("assistant", answers[number]))
        for last in (self.assessed_answer, self.prefill):
            if last is not None:
                messages.append(_message("assistant", last))
        return messages


def _message(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": break_special_tokens(text)}]}


def _text_parts(text: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": break_special_tokens(text)}] if text else []


@dataclass(frozen=True)
class ChatResponse:
    """The response to one request: a text, or an error."""

    id: str
    text: str | None
    error: str | None = None
    finish_reason: str | None = None  # as reported by the server: "stop", "length", ...
    tokens: tuple[int, int] | None = None  # prompt and completion tokens, if the server reports them


OnChatResponse = Callable[[ChatResponse], None]


class ChatModel(Protocol):
    """Responds to requests. Decoding is greedy, so that responses can be cached, unless sampling is configured."""

    def identity(self) -> Mapping[str, object]:
        """Returns everything besides the request that determines a response."""

    def run(self, requests: Iterable[ChatRequest], on_response: OnChatResponse) -> None:
        """Calls `on_response` once per request, in any order."""


class ChatCache:
    """Response texts in one SQLite file, by the digest of the model and the content of the request.

    Several processes can share the file, and a killed process loses nothing.

    Raises:
        RunError: The file cannot be opened as a database.
    """

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._database = sqlite3.connect(file, timeout=60, isolation_level=None)
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=NORMAL")
            self._database.execute("CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, text TEXT NOT NULL)")
        except sqlite3.Error as error:
            raise RunError(
                f"the response cache cannot be opened ({error}). Delete the file, or move it with VLM_UNLEARN_CACHE.",
                code="file-unreadable",
                file=file,
            ) from None

    def get(self, key: str) -> str | None:
        """Returns the text of a cached response, or None."""
        row = self._database.execute("SELECT text FROM replies WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def put(self, key: str, text: str) -> None:
        """Caches the text of a response."""
        encodable = text.encode("utf-8", "replace").decode("utf-8")  # SQLite rejects lone surrogates
        self._database.execute("INSERT OR REPLACE INTO replies (key, text) VALUES (?, ?)", (key, encodable))


def complete_many(
    model: ChatModel, requests: Iterable[ChatRequest], cache: ChatCache | None, on_response: OnChatResponse
) -> int:
    """Gets a response to every request, from the cache or the model.

    A request is not sent while an identical one is pending; both get the same response. Only texts are cached, so that
    failed requests are sent again by the next call. Memory use does not grow with the number of requests.

    Args:
        model: The chat model.
        cache: The cache to use, or None.
        requests: The requests, with distinct ids. They are consumed as they are sent.
        on_response: Called once per request, in any order.

    Returns:
        The number of requests sent to the model.
    """
    identity = model.identity()
    image_digests: dict[ImageSource, str] = {}
    duplicates: dict[str, list[str]] = {}  # key of a pending request -> ids of the identical requests that wait for it
    pending_keys: dict[str, str] = {}  # id of a pending request -> its key
    num_sent = 0

    def uncached_requests() -> Iterator[ChatRequest]:
        nonlocal num_sent
        for request in requests:
            try:
                image = request.image
                if image is not None and image not in image_digests:
                    image_digests[image] = image.digest if isinstance(image, ImageReference) else digest_file(image)
            except OSError as error:
                on_response(ChatResponse(request.id, None, f"{request.image}: {error.strerror}"))
                continue
            image_digest = image_digests[request.image] if request.image else None
            seed = {} if request.seed is None else {"seed": request.seed}
            chat: dict[str, object] = {"history": request.history} if request.history else {}
            chat |= {} if request.system is None else {"system": request.system}
            chat |= {"image_offset": request.image_offset} if request.image_offset else {}
            chat |= {} if image_digest is None else {"decoder": DECODER_VERSION}
            chat |= {"image_round": request.image_round} if request.image_round else {}
            chat |= {} if request.prefill is None else {"prefill": request.prefill}
            chat |= {} if request.temperature is None else {"temperature": request.temperature}
            chat |= {} if request.assessed_answer is None else {"assessed_answer": request.assessed_answer}
            content = {"text": request.text, "image": image_digest, **chat}
            key = digest_json({"model": identity, **content, **seed})
            cached_text = cache.get(key) if cache else None
            if cached_text is not None:
                on_response(ChatResponse(request.id, cached_text))
            elif key in duplicates:
                duplicates[key].append(request.id)
            else:
                duplicates[key], pending_keys[request.id] = [], key
                num_sent += 1
                yield request

    def on_model_response(response: ChatResponse) -> None:
        key = pending_keys.pop(response.id)
        if cache and response.text is not None:
            cache.put(key, response.text)
        on_response(response)
        for id in duplicates.pop(key):
            on_response(replace(response, id=id, tokens=None))  # the tokens were spent once

    model.run(uncached_requests(), on_model_response)
    return num_sent


def complete_all(
    model: ChatModel,
    requests: Iterable[ChatRequest],
    cache: ChatCache | None,
    on_progress: Callable[[int], None] | None = None,
) -> tuple[dict[str, ChatResponse], int]:
    """Returns all responses by id, and the number of requests sent to the model. Otherwise like `complete_many`.

    Args:
        model: The chat model.
        cache: The cache to use, or None.
        requests: The requests, with distinct ids.
        on_progress: Called after each response with the number of responses so far.
    """
    responses: dict[str, ChatResponse] = {}

    def on_response(response: ChatResponse) -> None:
        responses[response.id] = response
        if on_progress:
            on_progress(len(responses))

    num_sent = complete_many(model, requests, cache, on_response)
    return responses, num_sent


def response_from_text(
    request: ChatRequest, text: str | None, finish_reason: str | None, max_tokens: int
) -> ChatResponse:
    """Returns the response with a model's text, or with an error if the text is truncated or empty."""
    error = None
    if not text:
        error = "empty answer"
    elif finish_reason == "length":
        error = f"the answer was truncated at {max_tokens} tokens. Raise max_tokens: {quoted(text)}"
    return ChatResponse(request.id, None if error else text, error, finish_reason=finish_reason)
